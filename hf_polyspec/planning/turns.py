# SPDX-License-Identifier: Apache-2.0
"""Times taken in turns, and the figure that is kept of each.

A call runs many passes, so what interrupts a pass now and then is in every call, while the median of single passes
leaves it out. What is kept of a model is therefore the sum of its passes over a turn, by the same statistic as that of
the calls beside it; the medians of single passes only say how that sum is shared among the sizes.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Hashable, Mapping
from typing import TypeVar

Key = TypeVar("Key", bound=Hashable)
Turn = tuple[int, int]
"""(repeat, text): a turn of measuring lies between the calls on one text in one repeat."""
Times = Mapping[Key, Mapping[Turn, float]]
"""Seconds of one thing in every turn."""


def over_turns(of_turn: Mapping[Turn, float]) -> float:
    """The median over the repeats of each text, and the mean over the texts: what `verify` keeps of the calls.

    Args:
        of_turn: a figure of every turn.
    """
    places = sorted({place for _, place in of_turn})
    return statistics.fmean(
        statistics.median(value for (_, at), value in of_turn.items() if at == place) for place in places
    )


def settled(times: Times[Key], group: Callable[[Key], Hashable]) -> dict[Key, float]:
    """Seconds of each thing such that those of a group add up to what a turn of the group takes.

    Args:
        times: all things of a group must have been timed in the same turns.
        group: of a thing: the passes of one model, the drafts of one drafter.
    """
    groups: dict[Hashable, list[Key]] = {}
    for key in times:
        groups.setdefault(group(key), []).append(key)
    found: dict[Key, float] = {}
    for keys in groups.values():
        medians = {key: statistics.median(times[key].values()) for key in keys}
        turns = times[keys[0]].keys()
        whole = over_turns({turn: sum(times[key][turn] for key in keys) for turn in turns})
        share = whole / sum(medians.values()) if any(medians.values()) else 1.0
        found.update({key: share * medians[key] for key in keys})
    return found
