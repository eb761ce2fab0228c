# SPDX-License-Identifier: Apache-2.0
"""Training of EAGLE heads: texts, features, losses, the loop and its command."""
