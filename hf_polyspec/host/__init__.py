# SPDX-License-Identifier: Apache-2.0
"""transformers as it is installed: the only room that knows a release, its names and its internals (law 8)."""
