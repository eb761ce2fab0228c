# SPDX-License-Identifier: Apache-2.0
"""A runner's pass over one row of which nothing but the likeliest ids is asked."""

from __future__ import annotations

from ..errors import level_failures
from ..exactness.context import Context, common_prefix
from ..exactness.passes import Picks
from ..telemetry.counters import LevelStats
from .cache import RollbackCache
from .moments import one_moment
from .runner import ModelRunner
from .straight import MOST


def picks(
    runner: ModelRunner, context: Context, draft: list[int], stats: LevelStats, known: int, *, exact: bool = True
) -> Picks | None:
    """What a model says likeliest behind the context and behind each token of a draft, of a row that is alone.

    Args:
        runner: the model's; context: one row; draft: proposed tokens, possibly none.
        stats: where the pass is counted; known: ids that there are, the first ones.
        exact: whether of two ids that are all but equally likely it must be the one that `runner.run` would show; a
            level whose word another checks may as well say the other.

    Returns:
        None, and nothing has changed, where a pass has to be `run`.

    Raises:
        LevelError: as `run` does.
    """
    if type(runner) is not ModelRunner or not runner.memo or not _is_plain(runner, context):
        return None
    ids, held = context.ids[0] + draft, runner.memo[0]
    keep = min(common_prefix(held, ids), len(ids) - 1 - len(draft))
    fresh = ids[keep:]
    if len(fresh) > MOST or keep < max(runner.cache.floor, context.prompt.width):
        return None
    if runner.lender is not None and len(fresh) - len(draft) > runner.borrows_from:
        return None
    if runner._rows is not None and max(fresh) >= runner._rows:
        return None
    position = context.prompt.following[0] + keep - context.prompt.width
    try:
        with level_failures(f"the forward pass of {runner.name} failed"), one_moment():
            straight = runner._forwarding.straight
            likeliest, leads = straight.picks(fresh, position, runner.cache, keep, known, exact)
    except Exception:
        runner._recover(keep)
        raise
    if not likeliest:
        return None
    stats.forward_passes += 1
    runner.memo = [ids]
    wanted = 1 + len(draft)
    return Picks(likeliest[-wanted:], leads[-wanted:], len(fresh), ids)


def _is_plain(runner: ModelRunner, context: Context) -> bool:
    """Whether there is one row, and nothing but its ids, so that a pass that makes nothing else may do for it."""
    prompt = context.prompt
    if context.batch != 1 or prompt.mask is not None or prompt.hidden or prompt.embeds is not None:
        return False
    usual = runner.use_cache and type(runner.cache) is RollbackCache and len(runner.memo) == 1
    told = runner.takes_positions and runner._forwarding.plain and not runner._arguments.any and not runner.record
    return usual and told and runner._table is None and not runner.in_step
