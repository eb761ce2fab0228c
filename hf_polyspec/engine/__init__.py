# SPDX-License-Identifier: Apache-2.0
"""One chain for many callers: prompts join while others run (`Engine`, `generate_batch`)."""
