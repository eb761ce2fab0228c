# SPDX-License-Identifier: Apache-2.0
"""Seconds of a model's passes by their columns, all rows together, gauged from the passes themselves."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence

import torch

KEPT = 0.98
"""What a pass leaves of the weight of those before it: about the last 50 count."""
TRUST = 4.0
"""Passes that the expected cost of a column stands for, unless given."""
SIZE_KEPT, FORGOTTEN = 0.995, 0.25
"""What a pass leaves of the weight of those of every size, and the weight at which a size is forgotten."""
SIZE_TRUST = 4.0
"""Passes that the line stands for in those of one size."""
ASIDE = 0.25
"""A pass counts as at most this part of the line beside it."""
OUTLIER = 2.0
"""A pass counts for at most this many times what was expected of it, and at least for as small a part."""
ON_CPU, ELSEWHERE = 0.03, 0.003
"""Expected cost of a column, in passes over one: what holds until passes of several sizes were timed."""
_TYPICAL = 16.0
"""Columns over which an error of the expected cost is weighed."""


class PassSeconds:
    """A straight line of columns over a shape known beforehand, both of which follow what is measured.

    `seconds(n) = pace shape(n) + cost n`, by least squares of relative errors; passes fade, and the cost is drawn to
    what is expected of it, so that passes of one size alone leave it where it was.

    Columns of several rows do not lie on a line: one more may fill another tile, and the first that is drafted brings
    drafts, their judgement and what is rolled back. With `by_size`, a size that was seen of late takes what its own
    passes took, the line counting for a few of them, and what lies between two sizes lies between their seconds.

    Args:
        shape: seconds of a pass by columns, wrong by a factor perhaps; None where nothing was measured.
        device: where the model is, for what is expected where there is no shape.
        trust: passes that the expected cost of a column stands for.
        by_size: whether what passes of each size take beside the line is learnt as well.

    Attributes:
        passes: that were timed.
    """

    def __init__(
        self,
        shape: Callable[[float], float] | None = None,
        device: torch.device | None = None,
        trust: float = TRUST,
        by_size: bool = False,
    ) -> None:
        self._known = shape
        self._shapes: dict[int, float] = {}
        self._trust = trust
        self._by_size = by_size
        self._one = one = 1.0 if shape is None else max(1e-9, shape(1))
        slope = ELSEWHERE if device is not None and device.type != "cpu" else ON_CPU
        self._expected = slope if shape is None else 0.0
        self.pace = one
        self.cost = self._expected * one
        self.passes = 0
        self._sums = [0.0] * 5
        self._seen: dict[int, tuple[float, float]] = {}
        self._risen: tuple[list[int], list[float]] = [], []
        self._found: dict[float, float] = {}

    @property
    def informed(self) -> bool:
        """Whether anything was measured, beforehand or since."""
        return self._known is not None or self.passes > 0

    def seconds(self, columns: float) -> float:
        """Of a pass over so many columns."""
        found = self._found.get(columns)
        if found is None:
            found = self._found[columns] = self._beside(columns)
        return found

    def _line(self, columns: float) -> float:
        return self.pace * self._shape(columns) + self.cost * columns

    def _beside(self, columns: float) -> float:
        """Of a pass, by those of its size and of the sizes next to it; without any, what the line says."""
        line, (sizes, risen) = self._line(columns), self._risen
        if not sizes:
            return line
        right = bisect_left(sizes, columns)
        if right in (0, len(sizes)):  # as far from the line as the nearest
            last = min(right, len(sizes) - 1)
            return line * risen[last] / self._line(sizes[last])
        (one, other), (here, there) = sizes[right - 1 : right + 1], risen[right - 1 : right + 1]
        return here + (there - here) * (columns - one) / (other - one)

    def _shape(self, columns: float) -> float:
        """In passes over one column."""
        if self._known is None:
            return 1.0
        if not isinstance(columns, int):
            return self._known(columns) / self._one
        if (found := self._shapes.get(columns)) is None:  # a shape stays what it is, and is asked for all the time
            found = self._shapes[columns] = self._known(columns) / self._one
        return found

    def add(self, columns: int, seconds: float) -> None:
        """A pass over so many columns took so long."""
        if seconds <= 0:
            return
        before = self.seconds(columns)
        if self.passes:
            seconds = min(OUTLIER * before, max(before / OUTLIER, seconds))
        else:
            self.pace *= seconds / before
            self.cost *= seconds / before
        self.passes += 1
        shape, weight = self._shape(columns), 1 / seconds**2
        news = (shape * shape, shape * columns, columns * columns, shape * seconds, columns * seconds)
        self._sums = [KEPT * old + weight * new for old, new in zip(self._sums, news, strict=True)]
        self._solve()
        if self._by_size:
            self._learn_size(columns, seconds)
        self._found = {}

    def _learn_size(self, columns: int, seconds: float) -> None:
        aside = min(ASIDE, max(-ASIDE, seconds / self._line(columns) - 1))
        faded = ((size, SIZE_KEPT * count, SIZE_KEPT * whole) for size, (count, whole) in self._seen.items())
        seen = {size: (count, whole) for size, count, whole in faded if count > FORGOTTEN}
        count, whole = seen.get(columns, (0.0, 0.0))
        seen[columns] = count + 1, whole + aside
        self._seen, sizes = seen, sorted(seen)
        counts = [seen[size] for size in sizes]
        points = [
            (self._line(size) * (1 + whole / (count + SIZE_TRUST)), count)
            for size, (count, whole) in zip(sizes, counts, strict=True)
        ]
        self._risen = sizes, rising(points)  # at once: other threads read it

    def scale(self, factor: float) -> None:
        """As if every pass had taken so many times what it took."""
        self.pace, self.cost, self._found = self.pace * factor, self.cost * factor, {}
        powers = (2, 2, 2, 1, 1)  # a pass weighs by its seconds
        self._sums = [old / factor**power for old, power in zip(self._sums, powers, strict=True)]

    def _solve(self) -> None:
        """The pace and cost of least relative squares; neither is ever negative."""
        of_shape, of_both, of_columns, shape_seconds, column_seconds = self._sums
        trust = self._trust * (_TYPICAL / self._line(_TYPICAL)) ** 2
        a = of_shape + trust * self._expected**2
        b = of_both - trust * self._expected
        c = of_columns + trust
        determinant = a * c - b * b
        pace = (c * shape_seconds - b * column_seconds) / determinant
        cost = (a * column_seconds - b * shape_seconds) / determinant
        if cost < 0 or pace <= 0:
            pace, cost = (shape_seconds / of_shape, 0.0) if cost < 0 else (0.0, column_seconds / of_columns)
        self.pace, self.cost = pace, cost


def rising(points: Sequence[tuple[float, float]]) -> list[float]:
    """Values that never fall, nearest to (value, weight) each by weighted squares: neighbours that fall are pooled."""
    pools: list[tuple[float, float, int]] = []
    for value, weight in points:
        count = 1
        while pools and pools[-1][0] > value:
            other, others, more = pools.pop()
            value, weight, count = (value * weight + other * others) / (weight + others), weight + others, count + more
        pools.append((value, weight, count))
    return [value for value, _, count in pools for _ in range(count)]
