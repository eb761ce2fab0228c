# SPDX-License-Identifier: Apache-2.0
"""What is known of a level that drafts for rows which run together."""

from __future__ import annotations

from dataclasses import dataclass, field

from .row_rates import RowRates
from .sureness import Sureness

HOPE = 0.5
"""Tokens that drafts are expected to win in a row and round, at first."""
NEWEST = 0.25
TIMED = 4
"""Drafts that were timed before what they took is believed in a generation to come."""
STANDS = 2
"""Looks at drafts that those of a generation before stand for."""


@dataclass
class Known:
    """What is known of one level below.

    Attributes:
        rates: acceptance by row; sureness: of what it says of its drafts itself.
        seconds: of a draft, by token of the longest (of a tree, by node; where chances are told, as a whole); None
            before one was timed. rows: that those drafts were of. reading: seconds besides for each
            id that it has missed.
        gain: seconds that a round of drafts wins, expected of late, where chances are told; looks: drafts it is of.
        asked: the turn in which it was asked last.
        tried: by row, the turn of its last draft; known: rows that it has drafted for.
        timed, reads: drafts whose seconds were learnt from, and such readings.
        before: whether what is known of its drafts was learnt in a generation before.
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
    timed: int = 0
    reads: int = 0
    before: bool = False
    _first: tuple[float, int, int] | None = None

    def carried(self) -> Known:
        """The same for other rows of the same kind: what is no matter of one text stands for a few drafts.

        Only of a level that tells its chances, and was timed several times, is it kept what drafts take and win: that
        is looked at now and then whatever it seems to take. A model's drafts are timed, and their rates found, anew.
        """
        found = Known(sureness=self.sureness.carried(), rows=self.rows)
        if self.looks and self.timed >= TIMED:
            found.seconds, found.reading, found.gain = self.seconds, self.reading, self.gain
            found.looks, found.timed, found.reads, found.before = STANDS, self.timed, self.reads, True
        return found

    def time(self, seconds: float, rows: int) -> None:
        """A draft of so many rows took so long."""
        self.timed += 1
        if self.seconds is None:
            self.seconds, self.rows = seconds, rows
            if self._first is not None:
                self.read(*self._first)
        elif self.timed < TIMED and seconds < self.seconds:
            self.seconds, self.rows = seconds, rows
        else:
            self.seconds += NEWEST * (min(3 * self.seconds, seconds) - self.seconds)
            self.rows += NEWEST * (rows - self.rows)

    def read(self, seconds: float, size: int, ids: int, usual: float | None = None) -> None:
        """A draft of so many tokens took so long with the reading of so many ids.

        Args:
            usual: seconds of a token that are expected before one was timed.
        """
        one = usual if self.seconds is None else self.seconds
        if one is None:  # what a draft takes is known when there is one of a text that was read
            self._first = seconds, size, ids
            return
        once = max(0.0, seconds - size * one) / max(1, ids)
        self.reads += 1
        if self.reads == 1 or (self.reads <= TIMED and once < self.reading):
            self.reading = once
        else:
            self.reading += NEWEST * (once - self.reading)


@dataclass
class Learnt:
    """What a verifier has learnt of those that draft for its rows.

    Attributes:
        promise: tokens that drafts are expected to win in a row and round; of: the same level by level, by their index.
    """

    promise: float = field(default_factory=lambda: HOPE)
    of: dict[int, Known] = field(default_factory=dict)

    def known(self, level: int) -> Known:
        """What is known of one of them."""
        return self.of.setdefault(level, Known())

    def carried(self) -> Learnt:
        """The same for another generation."""
        found = {level: known.carried() for level, known in self.of.items()}
        return Learnt(self.promise if any(known.before for known in found.values()) else HOPE, found)
