# SPDX-License-Identifier: Apache-2.0
"""What a level has missed while it was off, what reading it costs, and a first look at a level never run."""

from __future__ import annotations

from collections.abc import Callable, Collection

from ..exactness.context import Context
from ..host.runner import ModelRunner
from ..levels.base import Drafter
from ..levels.eagle import EagleDrafter
from ..levels.verifier import Verifier
from .estimates import Knowledge, Times
from .pace import BEHIND
from .setups import Chain


def missing(level: Drafter, context: Context) -> int:
    """Tokens of the longest row that a level's model has not read; 0 for a level without one."""
    if isinstance(level, EagleDrafter):
        return max(0, max(len(ids) for ids in context.ids) - 1 - level.pairs.width)
    runner = getattr(level, "runner", None)
    if not isinstance(runner, ModelRunner):
        return 0
    return max(0, *runner.lacks(context))


def unread(level: Drafter, context: Context, drafted: Collection[int]) -> list[int]:
    """Ids of each row that a level reads before it drafts: more than a round leaves behind.

    Args:
        level: that is to draft; drafted: places of rows that it has drafted for, where its own numbers do not tell.
    """
    runner = getattr(level, "runner", None)
    # Of what has no ids, or is read anew in every pass, a runner's numbers say nothing.
    if isinstance(runner, ModelRunner) and runner.use_cache and not context.prompt.hidden:
        return [count if count > BEHIND else 0 for count in runner.lacks(context)]
    return [0 if place in drafted else len(ids) for place, ids in zip(context.places, context.ids, strict=True)]


def catch_up_seconds(chain: Chain, knowledge: Knowledge, context: Context, levels: tuple[int, ...]) -> float:
    """Seconds that the levels below the target need, beyond those of a round, to read what they have missed."""
    total = 0.0
    for index in levels[1:]:
        behind = missing(chain.levels[index], context)
        if behind > 1:
            total += knowledge.pass_seconds(index, context.batch * behind)
            total -= knowledge.pass_seconds(index, context.batch)
    return max(0.0, total)


def ready(chain: Chain, knowledge: Knowledge, levels: tuple[int, ...]) -> bool:
    """Whether every verifier among the levels was timed."""
    return all(knowledge.timed(index) for index in levels if isinstance(chain.levels[index], Verifier))


def scout(level: Drafter, context: Context, times: Times, clock: Callable[[], float]) -> float:
    """Let a level that has read nothing read the first two tokens of the text, one after the other.

    The cheapest way to learn what its passes cost: nothing is drawn, and what it reads it would have to read anyway.

    Returns:
        Seconds it took; 0 if the level could not be fed or has read something already.
    """
    runner = getattr(level, "runner", None)
    if not isinstance(runner, ModelRunner) or any(runner.memo):
        return 0.0
    started = clock()
    for end in (1, 2):
        piece = Context([ids[:end] for ids in context.ids], context.prompt)
        if min(len(ids) for ids in context.ids) < end or not runner.can_read(piece):
            break
        began = clock()
        passed = runner.run(piece, [[] for _ in piece.ids], level.stats)
        # What came out is waited for, or a device would still be at it.
        float(passed.logits[0, -1, 0])
        times.add(piece.batch, clock() - began)
        if isinstance(level, Verifier):
            level.below.watch(passed)
    return clock() - started
