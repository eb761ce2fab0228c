# SPDX-License-Identifier: Apache-2.0
"""Whether a chain's rounds run nothing but this library's and transformers' code: see `host.moments`."""

from __future__ import annotations

from ..host.moments import runs_known_code
from .base import Drafter
from .causal_lm import CausalLMDrafter
from .verifier import Verifier


def asks_nobody(level: Drafter) -> bool:
    """Whether nobody else's code runs while a level and those below it work: no drafter, module or hook of a user's."""
    while type(level) is Verifier:
        if not runs_known_code(level.runner.model):
            return False
        level = level.below
    if type(level) is CausalLMDrafter:
        return runs_known_code(level.runner.model)
    return level.drafts_alone
