# SPDX-License-Identifier: Apache-2.0
"""The members of a chain: verifiers and drafters."""

from .base import Drafter, Proposal

__all__ = ["Drafter", "Proposal"]
