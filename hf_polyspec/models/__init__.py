# SPDX-License-Identifier: Apache-2.0
"""Models, assistants and heads by name, and what can be said of them."""
