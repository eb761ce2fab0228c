# SPDX-License-Identifier: Apache-2.0
"""Seconds of the passes of a chain's levels: what was measured beforehand, mended by the passes that are made."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ..telemetry.counters import Check
from .pass_seconds import PassSeconds

NEWEST = 0.1
"""Weight of the newest pass in the machine's pace."""
WIDEST = 64
TRUST = 0.05
"""Passes that the columns of a table stand for: what judging takes for each is in none."""
SETTLED = 8
"""Passes after which a level below the target says something of the machine, and not only of itself."""
DOUBTED = 2.0
"""A pass of a level before it has settled counts for at most this many times what its table says: it may have compiled
something."""
RESTED = 24
"""Passes of the target after which what a level that rests seemed to cost is to be found out anew."""
BEHIND = 4
"""Columns beyond those of a draft from which on a pass has read what its level had missed."""
EVERY = 4
"""Of so many passes that are like the last one is learnt from, and in one of so many rounds is looked over what most of
them leave as it is."""


class Usual:
    """Passes over several rows without a draft, as many columns as in the last: to learn from every one of them takes
    longer than all else that is decided in such a round."""

    def __init__(self) -> None:
        self._last = (0, 0)
        self._since = 0

    def is_like_the_last(self, check: Check) -> bool:
        """Whether a pass is one of those, and need not be learnt from."""
        kind = check.level, check.columns
        alike = len(check.asked) > 1 and not any(check.drafted) and kind == self._last
        self._last, self._since = kind, (self._since + 1) % EVERY if alike else 0
        return self._since > 0


class Pace:
    """How quick the machine is now, and what each level's passes cost at that pace.

    A table is of bare passes. In a chain judging comes with them, which costs as much for a quick model as for a slow
    one, and something for every column where tokens are drawn; that share is learnt of each level by itself. What makes
    all of them slower, other work on the machine, is one number, which levels that rest share.

    Args:
        tables: seconds of passes by columns, of each level that checks, the target first.

    Attributes:
        now: seconds of a pass in those at the pace of the tables.
    """

    def __init__(self, tables: Sequence[Callable[[float], float]]) -> None:
        self.now = 1.0
        self._tables = tables
        self._learnt: dict[int, PassSeconds] = {}
        self._met: set[tuple[int, int]] = set()
        self._resting: dict[int, int] = {}
        self._seen = 0

    def table_seconds(self, level: int, columns: float) -> float:
        """Of a pass of a level over so many columns, at the pace of the tables."""
        learnt = self._learnt.get(level)
        return self._tables[level](columns) if learnt is None else learnt.seconds(columns)

    def seconds(self, level: int, columns: float) -> float:
        """The same now."""
        return self.now * self.table_seconds(level, columns)

    def observe(self, level: int, columns: int, seconds: float, offered: int | None = None) -> float:
        """A pass took so long.

        Args:
            level: whose; columns: that were read, of all rows; seconds: with its judgement.
            offered: tokens of the draft that was read, None for as many as there may have been.

        Returns:
            How many of the seconds say nothing of the passes to come: something was compiled, or read from disk.
        """
        behind = offered is not None and columns > offered + 1 + BEHIND  # judged were only those of the draft
        if level >= len(self._tables) or not 0 < columns <= WIDEST or behind:
            return 0.0
        if (level or self._seen) and (level, columns) not in self._met:
            # The first pass of a size pays for what is set up once: the machine is no slower for that, and a level that
            # rests would never be seen without.
            self._met.add((level, columns))
            return max(0.0, seconds - self.seconds(level, columns))
        self._learn(level, columns, seconds)
        return 0.0

    def _learn(self, level: int, columns: int, seconds: float) -> None:
        learnt = self._learnt.get(level)
        if level == 0 or (learnt is not None and learnt.passes >= SETTLED):
            self._seen += 1
            ratio = seconds / max(1e-9, self.table_seconds(level, columns))
            # The first pass of all may have compiled something: the quicker of two counts.
            if self._seen == 1 or (self._seen == 2 and ratio < self.now):
                self.now = ratio
            bounded = min(2 * self.now, max(self.now / 2, ratio))
            self.now += max(NEWEST, 1 / self._seen) * (bounded - self.now)
            if level == 0:
                self._forget_resting()
        elif not self._seen:  # whether it is this level or the machine, the target's next pass will say
            return
        if learnt is None:
            learnt = self._learnt[level] = PassSeconds(self._tables[level], trust=TRUST)
        seconds /= self.now
        if level:
            self._resting[level] = 0
            if learnt.passes < SETTLED:
                seconds = min(seconds, DOUBTED * self._tables[level](columns))
        learnt.add(columns, seconds)
        if level == 0:
            self._tie(learnt)

    def _tie(self, target: PassSeconds) -> None:
        """What the target takes does not say how much of it is the machine's pace: its pass over one column is what the
        table says, or both would drift apart. Nothing changes by that but what is believed of a level that has not run.
        """
        factor = target.seconds(1) / self._tables[0](1)
        if factor > 0:
            self.now *= factor
            for learnt in self._learnt.values():
                learnt.scale(1 / factor)

    def _doubted(self, level: int, learnt: PassSeconds) -> bool:
        return learnt.passes < SETTLED or learnt.seconds(1) > DOUBTED * self._tables[level](1)

    def _forget_resting(self) -> None:
        """What is not asked, since it seemed dear once, would never be seen to be quick: a moment in which the machine
        had other work, between two passes of the target, looks like a dear level."""
        for level in [level for level, one in self._learnt.items() if level and self._doubted(level, one)]:
            self._resting[level] = self._resting.get(level, 0) + 1
            if self._resting[level] > RESTED:
                del self._learnt[level], self._resting[level]
