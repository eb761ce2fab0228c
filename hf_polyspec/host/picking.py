# SPDX-License-Identifier: Apache-2.0
"""A runner's pass of which nothing but the likeliest ids is asked."""

from __future__ import annotations

from collections.abc import Sequence

from ..errors import level_failures
from ..exactness.context import Context, common_prefix
from ..exactness.passes import Picks
from ..telemetry.counters import LevelStats
from .cache import RollbackCache
from .fed import Fed, OneRow, RowsApart
from .moments import one_moment
from .ragged import RaggedRunner
from .row_readings import Padded, Reading, once
from .runner import ModelRunner
from .span import Span
from .straight import MOST


def picks(
    runner: ModelRunner,
    context: Context,
    drafts: list[list[int]],
    stats: LevelStats,
    known: int,
    active: Sequence[bool] = (True,),
    *,
    exact: bool = True,
) -> Picks | None:
    """What a model says likeliest behind the context and behind each token of a draft.

    Args:
        runner: the model's, of one row or of rows apart; context: its rows; drafts: per row, possibly no tokens.
        stats: where the pass is counted; known: ids that there are, the first ones; active: the rows that are asked.
        exact: whether of two ids that are all but equally likely it must be the one that `runner.run` would show; a
            level whose word another checks may as well say the other.

    Returns:
        None where a pass has to be `run`: no row holds anything else then, though it may hold less, and have room.

    Raises:
        LevelError: as `run` does.
    """
    # One of another class has passes of its own.
    if type(runner) is RaggedRunner and _is_plain(runner, context):
        return _of_rows(runner, context, drafts, stats, known, active, exact)
    if type(runner) is ModelRunner and context.batch == 1 and all(active) and _is_plain(runner, context):
        return _of_one(runner, context, drafts[0], stats, known, exact)
    return None


def _is_plain(runner: ModelRunner, context: Context) -> bool:
    """Whether there is nothing but ids, so that a pass that makes nothing else may do."""
    if context.prompt.hidden or context.prompt.embeds is not None:
        return False
    told = runner.takes_positions and runner._forwarding.plain and not runner._arguments.any and not runner.record
    return told and runner.use_cache and runner._table is None and not runner.in_step


def _of_one(
    runner: ModelRunner, context: Context, draft: list[int], stats: LevelStats, known: int, exact: bool
) -> Picks | None:
    """Of a row that is alone."""
    if context.prompt.mask is not None or type(runner.cache) is not RollbackCache or len(runner.memo) != 1:
        return None
    ids, held = context.ids[0] + draft, runner.memo[0]
    keep = min(common_prefix(held, ids), len(ids) - 1 - len(draft))
    if not held or keep < max(runner.cache.floor, context.prompt.width):
        return None
    fresh = ids[keep:]
    if not _can_be_fed(runner, fresh) or _is_lent(runner, len(fresh) - len(draft)):
        return None
    position = context.prompt.following[0] + keep - context.prompt.width
    try:
        found = _said(runner, OneRow(fresh, position, runner.cache, keep), known, exact)
    except Exception:
        runner._recover(keep)
        raise
    if found is None:
        return None
    stats.forward_passes += 1
    runner.memo = [ids]
    wanted = 1 + len(draft)
    return Picks([found[0][-wanted:]], [found[1][-wanted:]], len(fresh), [ids])


def _of_rows(
    runner: RaggedRunner,
    context: Context,
    drafts: list[list[int]],
    stats: LevelStats,
    known: int,
    active: Sequence[bool],
    exact: bool,
) -> Picks | None:
    """Of rows that each have a region of the cache."""
    if not runner._forwarding.straight.may_pick:
        return None
    own = runner.own(context)
    if not all(own):
        return None
    readings = [
        runner._reading(row, ids + draft if draft else ids, 1 + len(draft), [])
        for row, (ids, draft, asked) in enumerate(zip(own, drafts, active, strict=True))
        if asked
    ]
    if sum(one.count for one in readings) > MOST or (runner.lender is not None and _lacks(runner, readings)):
        return None
    fresh = [token for one in readings for token in one.ids[one.held :]]
    if not fresh or not _can_be_fed(runner, fresh) or once(readings)[1]:
        return None  # rows that read the same are read once where a pass is run
    try:
        found = _said(runner, _placed(runner, context, readings, fresh), known, exact)
    except Exception:
        stats.forward_passes += 1
        runner.asked = None
        runner.forget()
        raise
    if found is None:
        return None
    stats.forward_passes += 1
    runner.asked = None
    return _by_row(runner, context, readings, found)


def _lacks(runner: RaggedRunner, readings: list[Reading]) -> bool:
    return any(_is_lent(runner, one.count - one.wanted + 1) for one in readings)


def _placed(runner: RaggedRunner, context: Context, readings: list[Reading], fresh: list[int]) -> RowsApart:
    """Make room for the new columns, and say where they go."""
    runner.make_room(readings)
    bases, spans, first = runner.ragged.regions[None].bases, [], 0
    for one in readings:
        spans.append(Span(first, one.count, bases[one.row], one.held))
        first += one.count
    positions = [place for one in readings for place in runner._positions(context, one)]
    return RowsApart(fresh, positions, runner.ragged, spans)


def _by_row(
    runner: RaggedRunner, context: Context, readings: list[Reading], found: tuple[list[int], list[float]]
) -> Picks:
    rows = context.batch
    tokens: list[list[int]] = [[] for _ in range(rows)]
    leads: list[list[float]] = [[] for _ in range(rows)]
    counts, end = [0] * rows, 0
    for one in readings:
        end += one.count
        wanted = slice(end - one.wanted, end)
        tokens[one.row], leads[one.row], counts[one.row] = found[0][wanted], found[1][wanted], one.count
        runner.memo[one.row] = one.ids
    read = Padded(context.ids, runner.padding(context.prompt), runner.memo)
    return Picks(tokens, leads, max(counts), read, counts)


def _can_be_fed(runner: ModelRunner, ids: list[int]) -> bool:
    """Whether there are no more than a pass of this kind is for, all of them the model's own."""
    return len(ids) <= MOST and (runner._rows is None or max(ids) < runner._rows)


def _is_lent(runner: ModelRunner, lacking: int) -> bool:
    """Whether so many columns of a text are rather taken from another model."""
    return runner.lender is not None and lacking > runner.borrows_from


def _said(runner: ModelRunner, fed: Fed, known: int, exact: bool) -> tuple[list[int], list[float]] | None:
    """Ids and leads behind all new columns, None where they cannot be had so."""
    with level_failures(f"the forward pass of {runner.name} failed"), one_moment():
        found = runner._forwarding.straight.picks(fed, known, exact)
    return found if found[0] else None
