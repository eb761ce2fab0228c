# SPDX-License-Identifier: Apache-2.0
"""A few rounds of a drafter under a target: how often it is right, and how long it takes."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch

from ..control.costs import Trial
from ..exactness.context import EMBEDDED, Context, Prompt
from ..exactness.distributions import LawMaker
from ..host.manners import runner_for
from ..host.ranks import ranks_of
from ..host.release import input_device
from ..levels.joined import SURE
from ..levels.suffix import SuffixDrafter
from .chain import build_chain, check_assistants, levels_of
from .meeting import here, share
from .members import lent
from .options import PolySpecOptions
from .setting import Setting

ROUNDS = 12
TOKENS = 3
"""Of each draft."""
_READ = 128
USUAL, USUAL_TOKENS = 0.5, 8.0
"""Share that is expected of a head before it was tried, and the tokens of a trial that this counts for."""
_WARM = 2
"""Rounds that pay for what is set up once."""


@torch.no_grad()
def tried(target: Any, member: Any, ids: Sequence[int]) -> Trial:
    """Let a drafter draft for a greedy text; collective where processes share the target.

    Args:
        target: as it is to run; member: a head or drafter, or what stands for it.
        ids: of a prompt, one or more; its end is gone on from.

    Returns:
        What it was like. Where the text repeats itself a suffix drafter is as right and costs nothing, so what is right
        there does not count.

    Raises:
        ValueError: it does not fit, or drafts nothing.
    """
    ids = [token for token in ids if token != EMBEDDED][-_READ:]
    device = input_device(target)
    options = PolySpecOptions(num_assistant_tokens=TOKENS)
    setting = Setting(options, device, frozenset(), 0, 1)
    ranks = ranks_of(target)
    members = here(target, [member], ranks)
    with lent(ranks.attempted(lambda: check_assistants(target, members), members)) as own:
        runner = runner_for(target, "the target", device, kept=1)
        chain = build_chain(target, own, setting, runner)
        share(chain, own, ranks)
        drafter, law = levels_of(chain)[1], LawMaker([], False, device)
        context = Context([ids], Prompt(len(ids), None, torch.arange(len(ids))[None]))
        suffix = SuffixDrafter()
        suffix.begin(2, 1, chain.vocabulary)
        right = judged = 0
        seconds = whole = float("inf")
        try:
            for turn in range(_WARM + ROUNDS):
                repeats = suffix.propose(context, [TOKENS], law).width >= SURE
                before, began = drafter.stats.seconds, time.perf_counter()
                emission = chain.round(context, [TOKENS + 1], law)
                context = context.extended(emission.tokens)
                if turn < _WARM:
                    continue
                if emission.drafted[0]:
                    seconds = min(seconds, (drafter.stats.seconds - before) / emission.drafted[0])
                if emission.drafted[0] == TOKENS:
                    whole = min(whole, time.perf_counter() - began)
                if not repeats:
                    right += emission.accepted[0]
                    judged += min(emission.drafted[0], emission.accepted[0] + 1)
        finally:
            chain.end()

    def found() -> Trial:
        if seconds == float("inf"):
            raise ValueError("It drafts nothing here.")
        share = (right + USUAL * USUAL_TOKENS) / (judged + USUAL_TOKENS)
        return Trial(share, seconds, None if whole == float("inf") else (TOKENS, whole))

    return ranks.told(ranks.attempted(found, None))  # type: ignore[no-any-return]
