# SPDX-License-Identifier: Apache-2.0
"""What a chain that was measured beforehand is expected to bring: seconds from its profile, acceptance as it comes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial

from ..planning.theory.cost_model import SecondsTable
from .known import Learnt
from .leads import Leads
from .pace import Pace
from .pass_seconds import PassSeconds

BLOCKS = (1, 2, 3, 4, 5, 6, 8, 10, 12, 16)
DRAFTS = (1, 2, 3, 4, 6, 8, 12, 16, 24)
STEPS = (0, 1, 2, 3, 4, 6)
"""Tokens of a draft that a head draws, which takes time for each."""
PAYS = 1.03
"""What a middle must promise while it runs: what is done between passes is in no table."""
FORGETS = 0.9
"""What a round leaves of the counts before it."""
PROVEN, RIGHT = 6.0, 0.8
"""Tokens of late, and the share of those that were tried, from which on what was kept is no luck."""
SURE = 0.8
"""Of what a suffix drafter offers, the share that is expected to be right."""
HEAD = -1
_NEWEST = 0.1

Points = Sequence[Sequence[float]]


@dataclass
class Share:
    """A share of tokens that were kept, of late; it starts from what is expected.

    Attributes:
        expected: 0 to 1; weight: tokens that the expectation stands for; kept, tried: since.
        least: tokens that it stands for in the end, as many as at first unless given.
    """

    expected: float
    weight: float
    kept: float = 0.0
    tried: float = 0.0
    least: float = float("inf")

    @property
    def value(self) -> float:
        """0 to 1."""
        return (self.kept + self.weight * self.expected) / (self.tried + self.weight)

    @property
    def proven(self) -> bool:
        """Whether it was seen to be high, and not only expected."""
        return self.kept >= PROVEN and self.kept >= RIGHT * self.tried

    def add(self, drafted: int, accepted: int) -> None:
        """One draft: those behind the first that was refused say nothing."""
        self.kept, self.tried = FORGETS * self.kept, FORGETS * self.tried
        self.weight = max(min(self.weight, self.least), FORGETS * self.weight)
        self.kept += accepted
        self.tried += accepted + (accepted < drafted)

    def hope(self, least: float) -> None:
        """The text may have changed: what was seen is forgotten, and at least so much is expected again."""
        self.kept, self.tried, self.expected = 0.0, 0.0, max(self.expected, least)


@dataclass(frozen=True)
class Trial:
    """What a few rounds of a head under a model were like.

    Attributes:
        share: of its tokens that is expected to be right among those whose predecessors are.
        step: seconds of drafting one token, in the quickest round: the quickest is what passes are timed by, too.
        whole: tokens of a draft, and seconds of the quickest round with one as long, the model's pass and all that a
            head makes it do included; None where there was none.
    """

    share: float
    step: float
    whole: tuple[int, float] | None = None

    def head(self, passes: SecondsTable) -> Head:
        """What drafts cost beside passes of the model over the same columns, and bring."""
        if self.whole is None:
            return Head(self.share, self.step)
        tokens, seconds = self.whole
        return Head(self.share, self.step, max(0.0, seconds - passes.seconds(tokens + 1) - tokens * self.step))


@dataclass(frozen=True)
class Head:
    """What is known of a head beforehand.

    Attributes:
        share: of its tokens that is expected to be kept; step: seconds of one.
        extra: seconds that a round with a draft takes besides: hidden states are shown, guesses are looked up.
    """

    share: float
    step: float
    extra: float = 0.0


@dataclass
class Standing:
    """How far up a chain stands, kept from one generation to the next.

    Attributes:
        place: on the ladder of setups, 0 for the whole chain; tokens: emitted so far.
        passed: seconds generated in so far, in those of a token of the target alone.
        due: by place, what `passed` is when it may be tried again; waits: by place, how long it had to wait. `HEAD`
            stands for drafts of a head, which go by `tokens`.
    """

    place: int = 0
    tokens: float = 0.0
    passed: float = 0.0
    due: dict[int, float] = field(default_factory=dict)
    waits: dict[int, float] = field(default_factory=dict)

    def copied(self, last: int) -> Standing:
        """The same for one generation, whose ladder ends at a place."""
        return replace(self, place=min(self.place, last), due=dict(self.due), waits=dict(self.waits))


class Costs:
    """Seconds of passes by their columns, at the pace of the machine now, and acceptance.

    Args:
        tables: [columns, seconds] of every level with a model that checks, the target first.
        agreed: the share of a middle's tokens that the target is expected to keep.
        head: what is known of a head below, if there is one.
        scale: of the errors of a middle that is a copy, in logits (`Leads`); None where it is not known.

    Attributes:
        tables: of passes as they were measured beforehand.
        leads: how likely a token of the middle is right, by how far it was ahead.
        middle, leaf, head: shares that were kept: of a middle, of what costs nothing to draft, of a head.
        learnt: by level that checks, what is known of the drafts of several rows.
        step, extra: seconds of a token of a head, and of a round with some besides, at the pace of the tables.
    """

    def __init__(
        self, tables: Sequence[Points], agreed: float, head: Head | None = None, scale: float | None = None
    ) -> None:
        self.tables = [SecondsTable(tuple((int(columns), float(seconds)) for columns, seconds in p)) for p in tables]
        self._pace = Pace([partial(self._table_seconds, level) for level in range(len(self.tables))])
        self.middle = Share(agreed, 16.0)
        self.leads = Leads(scale)
        self.leaf = Share(SURE, 24.0, least=6.0)
        self.head = None if head is None else Share(head.share, 6.0, least=1.0)
        self.step, self.extra = (0.0, 0.0) if head is None else (head.step, head.extra)
        self.standing = Standing()
        self._gauges: dict[int, PassSeconds] = {}
        self.learnt: dict[int, Learnt] = {}

    def gauge(self, level: int) -> PassSeconds:
        """Seconds of a level's passes over the columns of several rows, gauged on the way."""
        if level not in self._gauges:
            known = level < len(self.tables)
            self._gauges[level] = PassSeconds(self.tables[level].seconds if known else None, by_size=True)
        return self._gauges[level]

    def _table_seconds(self, level: int, columns: float) -> float:
        return self.tables[level].seconds(columns)

    @property
    def pace(self) -> float:
        """Of the machine now, in that of the tables."""
        return self._pace.now

    def seconds(self, level: int, columns: float) -> float:
        """Of a pass of a level over so many columns, its judgement included."""
        return self._pace.seconds(level, columns)

    def observe(self, level: int, columns: int, seconds: float, offered: int | None = None) -> float:
        """A pass took so long; how much of that says nothing of the passes to come (`Pace.observe`)."""
        return self._pace.observe(level, columns, seconds, offered)

    @property
    def step_seconds(self) -> float:
        """Of a token of a head, at the machine's pace."""
        return self.pace * self.step

    def observe_draft(self, tokens: int, seconds: float) -> None:
        """A head has drafted so many tokens in so many seconds."""
        once = seconds / max(1, tokens) / self.pace
        self.step += _NEWEST * (min(2 * self.step, max(self.step / 2, once)) - self.step)

    def speed_of_block(self, block: int, rows: int = 1, right: float | None = None) -> float:
        """Speed of a target over a middle that draws its tokens itself or checks a head's, in that of the target.

        Args:
            block: of the middle; rows: of each; right: share of its tokens that is kept, as seen of late unless given.
        """
        target = partial(self._pace.table_seconds, 0)
        whole = target(rows * (block + 1)) + block * self._middle_token(rows)
        return mean_emitted(self.middle.value if right is None else right, block) * target(rows) / whole

    def most_of_blocks(self, right: float, rows: int = 1) -> float:
        """The speed of the best block if such a share of its tokens were kept."""
        return max(self.speed_of_block(block, rows, right) for block in BLOCKS)

    def _middle_token(self, rows: int) -> float:
        """Seconds of a token of the middle, with a head below it where there is one."""
        alone = self._pace.table_seconds(1, rows)
        return alone if self.head is None else alone / self.speed_of_steps(self.steps(1, rows), 1, rows)

    def speed_of_steps(self, size: int, level: int, rows: int = 1) -> float:
        """Speed of a level over a head that drafts so many tokens, in that of the level alone."""
        assert self.head is not None
        table = partial(self._pace.table_seconds, level)
        whole = table(rows * (size + 1)) + size * self.step + (self.extra if size else 0.0)
        return mean_emitted(self.head.value, size) * table(rows) / whole

    def steps(self, level: int, rows: int) -> int:
        """Tokens of a head's drafts that promise most under a level; 0 where none pays."""
        return max(STEPS, key=lambda size: self.speed_of_steps(size, level, rows))

    def speed_of_draft(self, size: int, sure: float | None = None, *, level: int = 0, rows: int = 1) -> float:
        """Speed of a level over a drafter that costs nothing, in that of the level alone, when something is offered.

        Args:
            size: of a draft; sure: share that is kept, as seen of late unless given; level: that checks; rows: of it.
        """
        table = partial(self._pace.table_seconds, level)
        kept = self.leaf.value if sure is None else sure
        return mean_emitted(kept, size) * table(rows) / table(rows * (size + 1))

    def passing_by_pays(self, rows: int) -> bool:
        """Whether what costs nothing to draft is better checked by the target at once than by a middle before it.

        The middle's check costs a pass of its own and saves the target from drafts that are wrong.
        """
        target, middle = (partial(self._pace.table_seconds, level) for level in (0, 1))
        kept = self.leaf.value
        size = self.draft(0, rows)
        at_once = mean_emitted(kept, size) / target(rows * (size + 1))
        size = self.draft(1, rows)
        emitted, seconds = mean_emitted(kept, size), middle(rows * (size + 1))
        for block in BLOCKS:
            checks = math.ceil(block / emitted)
            whole = checks * seconds + target(rows * (checks * emitted + 1))
            if mean_emitted(self.middle.value, checks * emitted) / whole > at_once:
                return False
        return True

    def block(self, rows: int) -> int:
        """The block that promises most; 0 where none promises `PAYS` times the speed of the target alone."""
        best = max(BLOCKS, key=lambda size: self.speed_of_block(size, rows))
        return best if self.speed_of_block(best, rows) > PAYS else 0

    def draft(self, level: int, rows: int) -> int:
        """The longest draft that promises most."""
        return max(DRAFTS, key=lambda size: self.speed_of_draft(size, level=level, rows=rows))


def mean_emitted(kept: float, size: float) -> float:
    """Tokens of a round over a proposal of this size, each of which is kept with the same chance."""
    return float(size + 1) if kept >= 1 else (1 - kept ** (size + 1)) / (1 - kept)
