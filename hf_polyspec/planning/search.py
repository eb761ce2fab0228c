# SPDX-License-Identifier: Apache-2.0
"""The choice: every candidate predicted, the quickest first."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from .agreement import TREES
from .candidates import Level, sized, subsets
from .replay import Chain, Measurements, Replayed, replay

_APART = 1.5


@dataclass(frozen=True)
class Candidate:
    """A chain with what it is expected to do, and did if it was run.

    Attributes:
        chain: levels and sizes; predicted: over the recorded texts, at the speed the machine had for the plan.
        measured: tokens a second, None if it was not run.
        anew: predicted from times taken between the runs behind `measured`, None without such times.
    """

    chain: Chain
    predicted: Replayed
    measured: float | None = None
    anew: Replayed | None = None

    @property
    def error(self) -> float | None:
        """Predicted over measured, minus 1; both at one speed of the machine, if the times were taken anew."""
        found = self.anew or self.predicted
        return None if self.measured is None else found.tokens_per_second / self.measured - 1

    @property
    def planned_error(self) -> float | None:
        """The same of the prediction that was planned with, whatever the machine's speed was then."""
        return None if self.measured is None else self.predicted.tokens_per_second / self.measured - 1


def search(levels: Sequence[Level], measured: Measurements) -> list[Candidate]:
    """Predict every chain at every size.

    Args:
        levels: the target first; measured: the records.

    Returns:
        All candidates, the quickest first; of equals the one with fewer levels.
    """
    found = []
    for places in subsets(levels):
        if any(pair in measured.bound for pair in pairwise(places)):
            continue
        trees = len(places) > 1 and (places[-2], places[-1], TREES[0]) in measured.drafts
        found += [Candidate(chain, replay(chain, measured)) for chain in sized(levels, places, trees)]
    return sorted(found, key=lambda one: (one.predicted.seconds, len(one.chain.levels)))


def best_of_each(candidates: Sequence[Candidate]) -> list[Candidate]:
    """The best sizes of every subset, the quickest first."""
    found: dict[tuple[int, ...], Candidate] = {}
    for candidate in candidates:
        found.setdefault(candidate.chain.levels, candidate)
    return list(found.values())


def spread(candidates: Sequence[Candidate], count: int) -> list[Candidate]:
    """Candidates to run: the best of every subset, then other sizes that differ by half or more.

    Args:
        candidates: the quickest first; count: how many.
    """
    chosen = best_of_each(candidates)[:count]
    for candidate in candidates:
        if len(chosen) >= count:
            break
        if all(_differ(candidate.chain, other.chain) for other in chosen):
            chosen.append(candidate)
    return chosen


def _differ(one: Chain, other: Chain) -> bool:
    if one.levels != other.levels or (one.tree is None) != (other.tree is None):
        return True
    if bool(one.direct) != bool(other.direct):
        return True
    if one.tree is not None and other.tree is not None and one.tree != other.tree:
        return True
    sizes = ((one.block, other.block), (one.draft, other.draft))
    return any(max(pair) >= _APART * min(pair) and max(pair) for pair in sizes if min(pair)) and one != other
