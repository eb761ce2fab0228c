# SPDX-License-Identifier: Apache-2.0
"""Seconds of a model's passes by their columns, all rows together, gauged from the passes themselves."""

from __future__ import annotations

from collections.abc import Callable

import torch

KEPT = 0.98
"""What a pass leaves of the weight of those before it: about the last 50 count."""
TRUST = 4.0
"""Passes that the expected cost of a column stands for, unless given."""
OUTLIER = 2.0
"""A pass counts for at most this many times what was expected of it, and at least for as small a part."""
ON_CPU, ELSEWHERE = 0.03, 0.003
"""Expected cost of a column, in passes over one: what holds until passes of several sizes were timed."""
_TYPICAL = 16.0
"""Columns over which an error of the expected cost is weighed."""


class PassSeconds:
    """A straight line of columns over a shape known beforehand, both of which follow what is measured.

    `seconds(n) = pace (shape(n) + cost n)`, by least squares of relative errors; passes fade, and the cost is drawn to
    what is expected of it, so that passes of one size alone leave it where it was.

    Args:
        shape: seconds of a pass by columns, wrong by a factor perhaps; None where nothing was measured.
        device: where the model is, for what is expected where there is no shape.
        trust: passes that the expected cost of a column stands for.

    Attributes:
        passes: that were timed.
    """

    def __init__(
        self,
        shape: Callable[[float], float] | None = None,
        device: torch.device | None = None,
        trust: float = TRUST,
    ) -> None:
        self._known = shape
        self._shapes: dict[int, float] = {}
        self._trust = trust
        self._one = one = 1.0 if shape is None else max(1e-9, shape(1))
        slope = ELSEWHERE if device is not None and device.type != "cpu" else ON_CPU
        self._expected = slope if shape is None else 0.0
        self.pace = one
        self.cost = self._expected * one
        self.passes = 0
        self._sums = [0.0] * 5

    def seconds(self, columns: float) -> float:
        """Of a pass over so many columns."""
        return self.pace * self._shape(columns) + self.cost * columns

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

    def scale(self, factor: float) -> None:
        """As if every pass had taken so many times what it took."""
        self.pace, self.cost = self.pace * factor, self.cost * factor
        powers = (2, 2, 2, 1, 1)  # a pass weighs by its seconds
        self._sums = [old / factor**power for old, power in zip(self._sums, powers, strict=True)]

    def _solve(self) -> None:
        """The pace and cost of least relative squares; neither is ever negative."""
        of_shape, of_both, of_columns, shape_seconds, column_seconds = self._sums
        trust = self._trust * (_TYPICAL / self.seconds(_TYPICAL)) ** 2
        a = of_shape + trust * self._expected**2
        b = of_both - trust * self._expected
        c = of_columns + trust
        determinant = a * c - b * b
        pace = (c * shape_seconds - b * column_seconds) / determinant
        cost = (a * column_seconds - b * shape_seconds) / determinant
        if cost < 0 or pace <= 0:
            pace, cost = (shape_seconds / of_shape, 0.0) if cost < 0 else (0.0, column_seconds / of_columns)
        self.pace, self.cost = pace, cost
