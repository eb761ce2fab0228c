# SPDX-License-Identifier: Apache-2.0
"""What a chain that was measured beforehand is expected to bring: seconds from its profile, acceptance as it comes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from ..planning.theory.cost_model import SecondsTable
from .pass_seconds import PassSeconds

BLOCKS = (1, 2, 3, 4, 5, 6, 8, 10, 12, 16)
DRAFTS = (1, 2, 3, 4, 6, 8, 12)
FORGETS = 0.9
"""What a round leaves of the counts before it."""
SURE = 0.8
"""Of what a suffix drafter offers, the share that is expected to be right."""
_NEWEST = 0.1
_WIDEST = 64

Points = Sequence[Sequence[float]]


@dataclass
class Share:
    """A share of tokens that were kept, of late; it starts from what is expected.

    Attributes:
        expected: 0 to 1; weight: tokens that the expectation stands for; kept, tried: since.
    """

    expected: float
    weight: float
    kept: float = 0.0
    tried: float = 0.0

    @property
    def value(self) -> float:
        """0 to 1."""
        return (self.kept + self.weight * self.expected) / (self.tried + self.weight)

    def add(self, drafted: int, accepted: int) -> None:
        """One draft: those behind the first that was refused say nothing."""
        self.kept, self.tried = FORGETS * self.kept, FORGETS * self.tried
        self.kept += accepted
        self.tried += accepted + (accepted < drafted)


@dataclass
class Standing:
    """How far up a chain stands, kept from one generation to the next.

    Attributes:
        place: on the ladder of setups, 0 for the whole chain; tokens: emitted so far.
        due: by place, the tokens from which on it may be tried again; waits: by place, how many it had to wait.
    """

    place: int = 0
    tokens: float = 0.0
    due: dict[int, float] = field(default_factory=dict)
    waits: dict[int, float] = field(default_factory=dict)


class Costs:
    """Seconds of passes by their columns, at the pace of the machine now, and acceptance.

    Args:
        tables: [columns, seconds] of every level with a model, the target first.
        agreed: the share of a middle's tokens that the target is expected to keep.
    """

    def __init__(self, tables: Sequence[Points], agreed: float) -> None:
        self.tables = [SecondsTable(tuple((int(columns), float(seconds)) for columns, seconds in p)) for p in tables]
        self.pace = 1.0
        self.middle = Share(agreed, 16.0)
        self.leaf = Share(SURE, 24.0)
        self.standing = Standing()
        self._gauges: dict[int, PassSeconds] = {}

    def gauge(self, level: int) -> PassSeconds:
        """Seconds of a level's passes over the columns of several rows, gauged on the way."""
        if level not in self._gauges:
            known = level < len(self.tables)
            self._gauges[level] = PassSeconds(self.tables[level].seconds if known else None)
        return self._gauges[level]

    def seconds(self, level: int, columns: float) -> float:
        """Of a pass of a level over so many columns."""
        return self.pace * self.tables[level].seconds(columns)

    def observe(self, level: int, columns: float, seconds: float) -> None:
        """A pass took so long: the machine may have become slower or quicker as a whole."""
        if level < len(self.tables) and 0 < columns <= _WIDEST:
            ratio = seconds / max(1e-9, self.tables[level].seconds(columns))
            self.pace += _NEWEST * (min(2 * self.pace, max(self.pace / 2, ratio)) - self.pace)

    def speed_of_block(self, block: int, rows: int = 1) -> float:
        """Speed of a target over a middle that draws its tokens itself, in that of the target alone."""
        whole = self.tables[0].seconds(rows * (block + 1)) + block * self.tables[1].seconds(rows)
        return _emitted(self.middle.value, block) * self.tables[0].seconds(rows) / whole

    def speed_of_draft(self, size: int, sure: float | None = None, *, level: int = 0, rows: int = 1) -> float:
        """Speed of a level over a drafter that costs nothing, in that of the level alone, when something is offered.

        Args:
            size: of a draft; sure: share that is kept, as seen of late unless given; level: that checks; rows: of it.
        """
        table = self.tables[level]
        kept = self.leaf.value if sure is None else sure
        return _emitted(kept, size) * table.seconds(rows) / table.seconds(rows * (size + 1))

    def block(self, rows: int) -> int:
        """The block that promises most; 0 where none promises more than the target alone."""
        best = max(BLOCKS, key=lambda size: self.speed_of_block(size, rows))
        return best if self.speed_of_block(best, rows) > 1 else 0

    def draft(self, level: int, rows: int) -> int:
        """The longest draft that promises most."""
        return max(DRAFTS, key=lambda size: self.speed_of_draft(size, level=level, rows=rows))


def _emitted(kept: float, size: int) -> float:
    """Tokens of a round over a proposal of this size, each of which is kept with the same chance."""
    return float(size + 1) if kept >= 1 else (1 - kept ** (size + 1)) / (1 - kept)
