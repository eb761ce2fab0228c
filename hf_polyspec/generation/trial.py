# SPDX-License-Identifier: Apache-2.0
"""A few rounds of a drafter under a target: how often it is right, and how long it takes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ..exactness.context import EMBEDDED, Context, Prompt
from ..exactness.distributions import LawMaker
from ..host.manners import runner_for
from ..host.release import input_device
from .chain import build_chain, check_assistants, levels_of
from .members import lent
from .options import PolySpecOptions
from .setting import Setting

ROUNDS = 12
TOKENS = 3
"""Of each draft."""
_READ = 128
_WARM = 2
"""Rounds that pay for what is set up once."""


@torch.no_grad()
def tried(target: Any, member: Any, ids: Sequence[int]) -> tuple[float, float]:
    """Let a drafter draft for a greedy text.

    Args:
        target: as it is to run; member: a head or drafter.
        ids: of a prompt, its end is gone on from.

    Returns:
        The share of tokens that were right among those whose predecessors were, and seconds of drafting one.

    Raises:
        ValueError: it does not fit.
    """
    ids = [token for token in ids if token != EMBEDDED][-_READ:] or [_first(target)]
    device = input_device(target)
    options = PolySpecOptions(num_assistant_tokens=TOKENS, polyspec_draft_copies=False)
    setting = Setting(options, device, frozenset(), 0, 1)
    with lent(check_assistants(target, [member])) as own:
        runner = runner_for(target, "the target", device, kept=1)
        chain = build_chain(target, own, setting, runner)
        drafter, law = levels_of(chain)[1], LawMaker([], False, device)
        context = Context([ids], Prompt(len(ids), None, torch.arange(len(ids))[None]))
        right = judged = drafted = 0
        seconds = 0.0
        try:
            for turn in range(_WARM + ROUNDS):
                before = drafter.stats.seconds
                emission = chain.round(context, [TOKENS + 1], law)
                context = context.extended(emission.tokens)
                if turn < _WARM:
                    continue
                seconds += drafter.stats.seconds - before
                drafted += emission.drafted[0]
                right += emission.accepted[0]
                judged += min(emission.drafted[0], emission.accepted[0] + 1)
        finally:
            chain.end()
    return right / max(1, judged), seconds / max(1, drafted)


def _first(target: Any) -> int:
    """A token that a text may begin with."""
    begin = getattr(target.generation_config, "bos_token_id", None)
    return int(begin) if isinstance(begin, int) else 0
