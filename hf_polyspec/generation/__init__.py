# SPDX-License-Identifier: Apache-2.0
"""From generate() to a chain and back: options, the doors, the chain's making, the loop."""
