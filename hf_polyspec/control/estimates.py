# SPDX-License-Identifier: Apache-2.0
"""What a running chain knows of itself: seconds of passes by their size, and acceptance by position.

Both forget slowly, so that they follow a text that becomes easier or a machine that becomes busier, and both are
turned into the tables of `planning.theory.cost_model`, which says what to expect of sizes that were never run.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from ..planning.theory.cost_model import Acceptance, SecondsTable

NEWEST = 0.25
"""Weight of the newest pass in the average of its size."""
OUTLIER = 3.0
"""A pass counts for at most this many times what was expected of it: something else had the machine."""
KEPT = 0.97
"""What a round leaves of the counts before it: about the last 33 rounds count."""
PRIOR_WEIGHT = 1.0
OPTIMISTIC = 0.95
"""Acceptance hoped for where nothing is known."""
EXPECTED = 0.5
"""Acceptance expected where nothing is known."""


def bucket(rows: float) -> int:
    """Passes of about the same size share an average: sizes up to 8 are told apart, larger ones by a fifth."""
    return round(rows) if rows <= 8 else 8 + math.ceil(4 * math.log2(rows / 8) - 1e-9)


@dataclass
class _Average:
    rows: float
    seconds: float
    count: int = 1


@dataclass
class Times:
    """Moving averages of the seconds of one kind of pass, by the number of its tokens (all rows together)."""

    averages: dict[int, _Average] = field(default_factory=dict)

    @property
    def known(self) -> bool:
        """Whether anything was measured."""
        return bool(self.averages)

    def add(self, rows: float, seconds: float) -> None:
        """One pass over `rows` tokens took `seconds`."""
        place = self.averages.get(bucket(rows))
        if place is None:
            self.averages[bucket(rows)] = _Average(float(rows), seconds)
            return
        if place.count == 1:
            # The first pass of a size pays for what is set up once; only a quicker second one can tell.
            place.seconds = min(place.seconds, seconds)
        else:
            place.seconds += NEWEST * (min(seconds, OUTLIER * place.seconds) - place.seconds)
        place.rows += NEWEST * (rows - place.rows)
        place.count += 1

    def at(self, rows: float, shape: Callable[[float], float]) -> float:
        """Seconds of a pass over `rows` tokens.

        Args:
            rows: tokens; shape: seconds that may be wrong by a factor, for sizes outside of those measured.
        """
        points = sorted((one.rows, one.seconds) for one in self.averages.values())
        if not points:
            return shape(rows)
        if rows <= points[0][0]:
            return _in_proportion(points[0], rows, shape)
        if rows >= points[-1][0]:
            return _in_proportion(points[-1], rows, shape)
        right = next(i for i, (known, _) in enumerate(points) if known >= rows)
        (low, before), (high, after) = points[right - 1], points[right]
        return before + (after - before) * (rows - low) / (high - low) if high > low else after

    def table(self, sizes: Sequence[int], rows: int, shape: Callable[[float], float]) -> SecondsTable:
        """For the cost model: seconds by tokens of each of `rows` rows."""
        return SecondsTable(tuple((size, self.at(rows * size, shape)) for size in sizes))


def _in_proportion(point: tuple[float, float], rows: float, shape: Callable[[float], float]) -> float:
    expected = shape(point[0])
    return point[1] * shape(rows) / expected if expected > 0 else point[1]


@dataclass
class Agreement:
    """How often position i of a proposal was accepted, among those whose positions before it were.

    A position that was asked for and not proposed counts as not accepted: it brought nothing.
    """

    tried: list[float] = field(default_factory=list)
    kept: list[float] = field(default_factory=list)
    offered: float = 0.0
    asked: float = 0.0
    rounds: int = 0

    def add(self, rows: Sequence[tuple[int, int, int]]) -> None:
        """One check: (tokens asked for, proposed, accepted) of every row that took part."""
        self.discount(KEPT)
        for asked, drafted, accepted in rows:
            self.asked += asked
            self.offered += drafted
            for position in range(min(accepted + 1, asked)):
                while len(self.tried) <= position:
                    self.tried.append(0.0)
                    self.kept.append(0.0)
                self.tried[position] += 1
                self.kept[position] += position < accepted
        self.rounds += bool(rows)

    def discount(self, factor: float) -> None:
        """Trust what was counted so far less."""
        self.tried = [count * factor for count in self.tried]
        self.kept = [count * factor for count in self.kept]
        self.offered *= factor
        self.asked *= factor

    def fade(self, most: float) -> None:
        """Let what was counted weigh no more than `most` rounds: it is to be found out anew."""
        weight = self.tried[0] if self.tried else 0.0
        if weight > most:
            self.discount(most / weight)

    @property
    def share_offered(self) -> float:
        """Tokens proposed per token asked for, 0 to 1."""
        return self.offered / self.asked if self.asked else 1.0

    def acceptance(self, depth: int, prior: float) -> Acceptance:
        """For the cost model; a position hardly seen is taken to be like the one before it.

        Args:
            depth: positions wanted; prior: rate expected of the first, 0 to 1.
        """
        rate, survival, reached = prior, [], 1.0
        for position in range(depth):
            tried = self.tried[position] if position < len(self.tried) else 0.0
            kept = self.kept[position] if position < len(self.kept) else 0.0
            rate = (kept + PRIOR_WEIGHT * rate) / (tried + PRIOR_WEIGHT)
            reached *= rate
            survival.append(reached)
        return Acceptance(tuple(survival))


@dataclass
class Knowledge:
    """Everything a chain has learnt of itself; may outlive a generation.

    Attributes:
        ratios: per level, its weights in bytes by the target's: what a pass may cost before one was timed.
        passes: per level, seconds of its passes by their tokens.
        drafts: per way of drafting, seconds of a draft by its tokens.
        agreements: per (upper level, lower level, tree size or 0).
        elapsed: seconds generated in, all generations together; spent: of those, lost by trying things out.
        allowance: seconds that may be lost before any were earned.
        due, interval: see `budget.Schedule`.
    """

    ratios: dict[int, float] = field(default_factory=dict)
    passes: dict[int, Times] = field(default_factory=dict)
    drafts: dict[bool, Times] = field(default_factory=dict)
    agreements: dict[tuple[int, int, int], Agreement] = field(default_factory=dict)
    elapsed: float = 0.0
    spent: float = 0.0
    allowance: float = 0.0
    due: dict[tuple[int, int], float] = field(default_factory=dict)
    interval: dict[tuple[int, int], float] = field(default_factory=dict)

    def pass_seconds(self, level: int, rows: float) -> float:
        """Seconds of a pass of a level over `rows` tokens."""
        if level == 0:
            return self.times(0).at(rows, _flattening)
        return self.times(level).at(rows, lambda r: self.prior_seconds(level, r))

    def prior_seconds(self, level: int, rows: float) -> float:
        """What a pass would take if levels differed in their bytes alone."""
        return self.ratios.get(level, 1.0) * self.pass_seconds(0, rows)

    def timed(self, level: int) -> bool:
        """Whether a pass of this level was ever measured."""
        return self.times(level).known

    def timed_at(self, level: int, rows: int) -> bool:
        """Whether a pass of at most this many tokens (or about as many) was measured."""
        return any(place <= bucket(rows) for place in self.times(level).averages)

    def times(self, level: int) -> Times:
        """Measured passes of a level."""
        return self.passes.setdefault(level, Times())

    def draft_times(self, tree: bool) -> Times:
        """Measured drafts, of trees or of chains."""
        return self.drafts.setdefault(tree, Times())

    def draft_seconds(self, level: int, tokens: int, rows: int, tree: bool) -> float:
        """Seconds of a whole draft."""
        step = self.pass_seconds(level, rows)
        # Every token of a chain is a pass; a tree is a few wider ones.
        power = 0.5 if tree else 1.0
        return self.draft_times(tree).at(tokens, lambda k: step * float(max(1.0, k) ** power))

    def agreement(self, upper: int, lower: int, tree: int = 0) -> Agreement:
        """Counts of one pair of levels."""
        return self.agreements.setdefault((upper, lower, tree), Agreement())


def _flattening(rows: float) -> float:
    """The target's time outside of what was measured: between memory-bound (the same) and compute-bound."""
    return float(max(1.0, rows) ** 0.5)
