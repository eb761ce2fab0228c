# SPDX-License-Identifier: Apache-2.0
"""How often the drafts of each row were accepted of late, by depth; a row that has just joined is like the others."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field

from .allotment import LEAST

ROW_KEPT, ALL_KEPT = 0.93, 0.98
"""What a draft leaves of the counts before it: of a row's own, of all rows'."""
LIKE_OTHERS = 4.0
"""Drafts that what is known of all rows stands for in a row."""
EXPECTED, TRUST = 0.7, 2.0
"""Expected of the first token where nothing is known, and the drafts that this stands for."""


@dataclass
class Counts:
    """By depth, drafts that got there, and those that were accepted there; both fade."""

    tried: list[float] = field(default_factory=list)
    kept: list[float] = field(default_factory=list)

    def add(self, drafted: int, accepted: int, fade: float) -> None:
        """One draft; what stands behind its first rejection was not tried."""
        for depth in range(len(self.tried)):
            self.tried[depth] *= fade
            self.kept[depth] *= fade
        for depth in range(min(drafted, accepted + 1)):
            if depth == len(self.tried):
                self.tried.append(0.0)
                self.kept.append(0.0)
            self.tried[depth] += 1
            self.kept[depth] += depth < accepted

    def rate(self, depth: int, expected: float, trust: float) -> float:
        """Accepted at a depth of those that got there."""
        if depth >= len(self.tried):
            return expected
        return (self.kept[depth] + trust * expected) / (self.tried[depth] + trust)


class RowRates:
    """Acceptance of one level's drafts, row by row."""

    def __init__(self) -> None:
        self._all = Counts()
        self._rows: dict[int, Counts] = {}

    def add(self, row: int, drafted: int, accepted: int) -> None:
        """A draft of the row of this name was judged."""
        self._all.add(drafted, accepted, ALL_KEPT)
        self._rows.setdefault(row, Counts()).add(drafted, accepted, ROW_KEPT)

    def keep(self, rows: Collection[int]) -> None:
        """Rows of other names have left."""
        if len(self._rows) > len(rows):
            self._rows = {row: counts for row, counts in self._rows.items() if row in rows}

    def chances(self, row: int, most: int) -> list[float]:
        """The chance that a draft is accepted up to each of its first `most` tokens, as far as there is any."""
        own = self._rows.get(row, Counts())
        found, reached, expected = [], 1.0, EXPECTED
        for depth in range(most):
            expected = self._all.rate(depth, expected, TRUST)
            reached *= own.rate(depth, expected, LIKE_OTHERS)
            if reached < LEAST:
                break
            found.append(reached)
        return found
