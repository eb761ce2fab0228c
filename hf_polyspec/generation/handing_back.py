# SPDX-License-Identifier: Apache-2.0
"""The target's cache after a call: extended as plain generation leaves it, at once or when somebody looks at it."""

from __future__ import annotations

import warnings
from functools import partial
from typing import Any

import torch

from ..exactness.context import Context
from ..host.generation import is_callers
from ..host.late_layers import fill_late, may_be_late
from ..host.own_cache import own_cache
from ..host.release import is_compiled
from ..host.runner import ModelRunner
from ..host.seq_to_seq import write_back
from ..models.changes import Stamp
from ..telemetry.counters import LevelStats

CHANGED = (
    "the model has changed between generate() and the first look at the cache in its output, and what the cache lacked "
    "of the rows that ended early was read by the model as it is now; look at it (len(output.past_key_values.layers)) "
    "before you change the model."
)


def hand_back(runner: ModelRunner, stats: LevelStats, final: Context, cache: Any, start: int, *, waits: bool) -> Any:
    """Extend a cache to all but the last token of every row.

    Args:
        runner: the target's, whose cache is used up; stats: its statistics.
        final: rows as the cache is to hold them.
        cache: that generate() prepared, or the caller brought; None where the model makes its own.
        start: columns that it holds.
        waits: whether it may be left until somebody looks at it, where that makes no difference to anybody.

    Returns:
        The cache that belongs into the output.
    """
    if cache is None:
        runner.settle(final, stats)
        return own_cache(runner)
    lacks = len(final.ids) > 1  # a row alone lacks nothing
    if not (waits and _may_wait(runner.model, cache, lacks)):
        runner.settle(final, stats)
        write_back(runner, cache, start)
        return cache
    before = Stamp(runner.model, unsaved=False) if lacks else None
    fill_late(cache, partial(_fill, runner, final, start, before))
    return cache


def _may_wait(model: Any, cache: Any, lacks: bool) -> bool:
    """Whether nobody but the output's owner knows the cache, and a pass, if it lacks one, says the same at any time."""
    busy = model.training or torch.is_autocast_enabled() or torch.is_autocast_enabled("cpu")
    return not busy and may_be_late(cache) and not is_callers(cache) and not (lacks and is_compiled(model))


def _fill(runner: ModelRunner, final: Context, start: int, before: Stamp | None, cache: Any) -> None:
    stats = LevelStats(runner.name, 0)  # those of the call are final
    changed = before is not None and not before.holds(runner.model)
    runner.settle(final, stats)
    write_back(runner, cache, start)
    if changed and stats.forward_passes:
        warnings.warn(CHANGED, stacklevel=2)
