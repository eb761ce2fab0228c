# SPDX-License-Identifier: Apache-2.0
"""What is known of a level that drafts for rows which run together."""

from __future__ import annotations

from dataclasses import dataclass, field

from .row_rates import RowRates
from .sureness import Sureness

NEWEST = 0.25


@dataclass
class Known:
    """What is known of one level below.

    Attributes:
        rates: acceptance by row; sureness: of what it says of its drafts itself.
        seconds: of a draft, by token of the longest (of a tree, by node; where chances are told, as a whole); None
            before one was timed. rows: that those drafts were of. reading: seconds besides for each
            id of a text that is drafted for the first time.
        gain: seconds that a round of drafts wins, expected of late, where chances are told; looks: drafts it is of.
        asked: the turn in which it was asked last.
        tried: by row, the turn of its last draft; known: rows that it has drafted for.
    """

    rates: RowRates = field(default_factory=RowRates)
    sureness: Sureness = field(default_factory=Sureness)
    seconds: float | None = None
    rows: float = 1.0
    reading: float = 0.0
    gain: float = 0.0
    looks: int = 0
    asked: int = 0
    tried: dict[int, int] = field(default_factory=dict)
    known: set[int] = field(default_factory=set)
    _first: tuple[float, int, int] | None = None

    def time(self, seconds: float, rows: int) -> None:
        """A draft of so many rows took so long."""
        if self.seconds is None:
            self.seconds, self.rows = seconds, rows
            if self._first is not None:
                self.read(*self._first)
        else:
            self.seconds += NEWEST * (min(3 * self.seconds, seconds) - self.seconds)
            self.rows += NEWEST * (rows - self.rows)

    def read(self, seconds: float, size: int, ids: int) -> None:
        """A draft of so many tokens took so long with the reading of so many ids."""
        if self.seconds is None:  # what a draft takes is known when there is one of a text that was read
            self._first = seconds, size, ids
            return
        once = max(0.0, seconds - size * self.seconds) / max(1, ids)
        self.reading = once if not self.reading else self.reading + NEWEST * (once - self.reading)
