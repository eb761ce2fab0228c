# SPDX-License-Identifier: Apache-2.0
"""The members of a chain: verifiers and drafters."""

from ..exactness.proposal import Proposal
from .base import Drafter

__all__ = ["Drafter", "Proposal"]
