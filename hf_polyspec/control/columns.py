# SPDX-License-Identifier: Apache-2.0
"""Where the columns of a batch go: every round, each row drafts as much as pays, all rows weighed against each other.

A `Columns` stands between a verifier and the level below it. What it grants a row follows from rounds that are over:
the seconds of passes by their columns, and how the rows' drafts have fared (law 2). A draft that nobody drew may be
looked at: it follows from the text, and so its length may follow from how likely it is. A row without others shares its
columns with nobody: it drafts what it would in a call of its own, and what is seen of that is known once others join.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from ..exactness.context import Context
from ..exactness.distributions import LawMaker
from ..exactness.proposal import Proposal, TreeProposal
from ..levels.base import Drafter
from ..levels.elsewhere import asking_here
from ..levels.verifier import NoDraft, Verifier
from ..telemetry.counters import Check
from .allotment import allotted, worths
from .known import NEWEST, Known, Learnt
from .pace import EVERY
from .pass_seconds import PassSeconds
from .readiness import unread
from .speaking import branch_of, rest, rounds_ahead, shortcut_of, speaker

SHARE = 0.005
"""Of the time, what may go into drafts that are not expected to pay."""
LONGEST = 24
"""Most tokens of a row's draft, where the drafter sets no end."""
PATIENCE = 8
"""Rounds that a row waits, at least, before what did not pay is tried again."""
UNTIMED = 2
"""Most tokens of a draft before one was timed."""
GUESS = 0.3
SOON, LATER = 4, 16
"""Rounds after which a drafter below a verifier is asked past that again: at first, and later."""
LOOK = 1.5
"""What a look at a draft takes with the account of it, in seconds of the draft."""
MOST_CREDIT = 2.0
"""Passes that may be lost at once."""
_IDLE = 4.0
"""Passes after which a pause is no time of this chain."""


class Columns:
    """Decides for one verifier how much each row drafts.

    Args:
        level: asks through this from now on.
        seconds: of its passes; learns.
        below: likewise of the level that it asks, where that is a verifier.
        passes_by: whether that verifier may be passed by, where the drafter below it promises more (`shortcut_of`).
        learnt: what is known of those that draft; learns.
    """

    def __init__(
        self,
        level: Verifier,
        seconds: PassSeconds,
        below: PassSeconds | None = None,
        *,
        passes_by: bool = False,
        learnt: Learnt | None = None,
    ) -> None:
        self.level = level
        self.seconds = seconds
        self.below = below
        self.passes_by = passes_by
        self.learnt = Learnt() if learnt is None else learnt
        self._home: Drafter | None = None
        asking = asking_here(level)
        self._ask, self._ask_for_tree = asking.ask, asking.ask_for_tree
        asking.ask, asking.ask_for_tree = self.ask, self.ask_for_tree
        self._places: Sequence[int] = ()
        self._lengths: list[int] = []
        self._turn = 0
        self._credit = self._one = 0.0
        self._asked_at: float | None = None
        self._nothing = False
        self._refused = 0
        self._asked: Known | None = None
        self._on_trial = False
        self._unread: list[int] = []
        self._left: Sequence[int] | None = None
        self._coming = 0.0
        self._worth: list[float] | None = None

    def tell_left(self, left: Sequence[int]) -> None:
        """So many tokens may each row emit yet."""
        self._left, self._worth = left, None
        self._coming = self.learnt.promise / (1 + self.learnt.promise) * max(left, default=0)

    @property
    def worth(self) -> list[float] | None:
        """Of a token of each row (`worths`), as drafts go; None where others take the place of rows that end, and all
        tokens are worth the same."""
        if self._worth is None and self._left is not None:  # in most rounds nobody asks
            self._worth = worths(self._left, self.seconds.seconds, self._coming)
        return self._worth

    # What the verifier calls

    def ask(
        self, source: Drafter, context: Context, rooms: list[int], law: LawMaker, vocabulary: int, eos: Collection[int]
    ) -> Proposal:
        """See `asking.ask`; rows that are to draft nothing are offered nothing, and where none is, nobody is asked."""
        nothing, self._nothing = self._nothing, False
        if self._home is not None:  # a round was given up
            source = self._come_home()
        self._places, self._lengths = context.places, list(map(len, context.ids))
        if isinstance(source, NoDraft) or not any(rooms):
            return self._ask(source, context, rooms, law, vocabulary, eos)
        if nothing:
            return Proposal.empty(context.batch)
        self._begin(rooms)
        if context.batch == 1:
            return self._unshared(source, context, rooms, law, vocabulary, eos)
        shortcut = shortcut_of(source, self.passes_by)
        if shortcut is None:
            offered = self._offered(source, context, rooms, law, vocabulary, eos)
            return Proposal.empty(context.batch) if offered is None else offered
        rests = shortcut is source  # a part of it
        known = self.learnt.known((branch_of(source) if rests else shortcut).index)
        offered, rival = None, known.gain - (known.seconds or 0.0)
        going = sum(room > 0 for room in rooms)
        again = self._refused != going or self._turn % EVERY == 0
        if again and self._turn - known.asked < (SOON if known.looks < SOON else LATER):
            offered = self._offered(source, context, rooms, law, vocabulary, eos, max(0.0, rival))
            self._refused = going if offered is None else 0
        if offered is None:
            self._home, self.level.source = source, shortcut  # until the check is over
            if rests:
                rest(source, True)
            offered = self._offered(shortcut, context, rooms, law, vocabulary, eos)
        return Proposal.empty(context.batch) if offered is None else offered

    def ask_for_tree(
        self, source: Drafter, context: Context, rooms: list[int], law: LawMaker, vocabulary: int
    ) -> TreeProposal | None:
        """See `asking.ask_for_tree`: a row grows a tree or none."""
        nodes = source.tree_nodes
        self._places, self._lengths = context.places, list(map(len, context.ids))
        if not nodes or not source.grows_trees or not any(rooms):
            return self._ask_for_tree(source, context, rooms, law, vocabulary)
        self._begin(rooms)
        known = self._known(source, context, rooms)
        self._unread, self._on_trial = unread(source, context, known.known), False
        wanted = rooms if context.batch == 1 else self._granted(source, known, rooms, nodes)
        self._nothing = not any(wanted)
        if self._nothing:
            return None
        began = self.level.stats.clock()
        tree = self._ask_for_tree(source, context, wanted, law, vocabulary)
        self._time(source, known, began, nodes if tree else 0, wanted)
        return tree

    def observe(self, check: Check, learns: bool = True) -> None:
        """A check of this verifier is over: learn what it cost, and how the rows' drafts have fared."""
        if check.level != self.level.index:
            return
        if self._home is not None:
            self._come_home()
        drafted = check.nodes or check.drafted
        if learns and 0 < check.columns <= sum(drafted) + len(check.asked):  # with more a prompt was read as well
            self.seconds.add(check.columns, check.seconds)
        known = self._asked
        if check.source is None or known is None or known.looks:  # where chances are told, those are what counts
            return
        won = sum(check.accepted) / max(1, len(check.asked))
        self.learnt.promise += NEWEST / 2 * (won - self.learnt.promise)
        for place, count, accepted in zip(self._places, check.drafted, check.accepted, strict=True):
            if count:
                known.rates.add(place, count, accepted)

    # How much each row drafts

    def _unshared(
        self, source: Drafter, context: Context, rooms: list[int], law: LawMaker, vocabulary: int, eos: Collection[int]
    ) -> Proposal:
        """What a level offers a row that is alone, as much as it likes to."""
        known = self._known(source, context, rooms)
        self._unread, self._on_trial, known.asked = unread(source, context, known.known), False, self._turn
        known.tried[context.places[0]] = self._turn
        began = self.level.stats.clock()
        offered = self._ask(source, context, rooms, law, vocabulary, eos)
        self._time(source, known, began, 1 if speaker(source).tells_chances else offered.width, rooms)
        return offered

    def _begin(self, rooms: list[int]) -> None:
        """A round begins."""
        now = self.level.stats.clock()
        elapsed = 0.0 if self._asked_at is None else now - self._asked_at
        self._one = one = self.seconds.seconds(len(rooms))
        self._credit = min(MOST_CREDIT * one, self._credit + SHARE * min(elapsed, _IDLE * one))
        self._asked_at, self._turn = now, self._turn + 1

    def _known(self, source: Drafter, context: Context, rooms: list[int]) -> Known:
        """What is known of the level that is to draft."""
        known = self._asked = self.learnt.known(speaker(source).index)
        going = {place for place, room in zip(context.places, rooms, strict=True) if room}
        here = going.union(known.tried).intersection(context.places)
        if len(known.tried) != len(here) or not going <= known.tried.keys():
            known.known.intersection_update(here)
            known.rates.keep(here)
            known.tried = {place: known.tried.get(place, self._turn) for place in here}
        return known

    def _come_home(self) -> Drafter:
        """The verifier is asked again, after its drafter was asked past it."""
        assert self._home is not None
        if self.level.source is self._home:
            rest(self._home, False)
        self.level.source, self._home = self._home, None
        return self.level.source

    def _offered(
        self,
        source: Drafter,
        context: Context,
        rooms: list[int],
        law: LawMaker,
        vocabulary: int,
        eos: Collection[int],
        rival: float = 0.0,
    ) -> Proposal | None:
        """What a level offers; None where nobody asks it.

        Args:
            rival: seconds that a round wins without it.
        """
        known = self._known(source, context, rooms)
        known.sureness.came(context)
        tells, self._on_trial = speaker(source).tells_chances, False
        cost = self._cost_of_look(known) if tells else 0.0
        if cost > max(0.0, self._credit):
            return None
        self._unread = unread(source, context, known.known)
        wanted = self._worthwhile(rooms) if tells else self._granted(source, known, rooms, 0, rival)
        if not any(wanted):
            return None
        known.asked, self._credit = self._turn, self._credit - cost
        began = self.level.stats.clock()
        offered = self._ask(source, context, wanted, law, vocabulary, eos)
        if tells:
            offered = self._cut(source, known, context, rooms, offered, sum(count > 0 for count in wanted))
        self._time(source, known, began, 1 if tells else offered.width, wanted)
        return offered

    def _granted(
        self, source: Drafter, known: Known, rooms: list[int], nodes: int = 0, rival: float = 0.0
    ) -> list[int]:
        """Tokens of every row's draft, before there is one; of trees, the room of rows that grow one."""
        timed = nodes or known.seconds is not None
        if not timed and not isinstance(source, Verifier):  # those take what the level above has read
            return self._first(known, rooms)
        rooms_now = rooms if timed else [min(room, UNTIMED) for room in rooms]
        most = LONGEST if source.most_tokens is None else source.most_tokens
        chances = [known.rates.chances(p, min(r, most)) for p, r in zip(self._places, rooms_now, strict=True)]
        if nodes:
            chances = [[sum(row) / nodes] * nodes if row else [] for row in chances]
        rows = sum(room > 0 for room in rooms)
        seconds = self._draft_seconds(source, known, rows, nodes)
        wanted = self._allotted(chances, rows, seconds)
        if any(self._reading(known, b) for b, count in enumerate(wanted) if count):
            wanted = self._worth_reading(known, chances, wanted, rooms, seconds)
        if nodes:
            wanted = [room if 2 * count >= nodes else 0 for count, room in zip(wanted, rooms, strict=True)]
        elif self._gain(chances, wanted, rows) - max(wanted) * seconds < rival:
            wanted = [0] * len(wanted)
        column = self.seconds.seconds(rows + 1) - self.seconds.seconds(rows)
        cost = max(1, nodes) * column
        costs = cost + (0.0 if any(wanted) else max(1, nodes) * seconds + rival)
        waiting = [b for b, room in enumerate(rooms) if room and not wanted[b]]
        due = [b for b in waiting if self._turn - known.tried[self._places[b]] >= PATIENCE]
        self._on_trial = not any(wanted)
        for b in sorted(due, key=lambda b: known.tried[self._places[b]]):
            price = self._at_most_all(costs + self._reading(known, b))
            if price > self._credit:
                break
            self._credit -= price
            wanted[b], costs = rooms[b] if nodes else 1, cost
        for place, count in zip(self._places, wanted, strict=True):
            if count:
                known.tried[place] = self._turn
        return wanted

    def _first(self, known: Known, rooms: list[int]) -> list[int]:
        """A level that was never timed drafts for one row, the shortest: it may have to read it."""
        going = [b for b, room in enumerate(rooms) if room]
        one = min(going, key=lambda b: (self._places[b] not in known.known, self._lengths[b]))
        known.tried[self._places[one]] = self._turn
        return [min(room, UNTIMED) if b == one else 0 for b, room in enumerate(rooms)]

    def _reading(self, known: Known, row: int) -> float:
        """Seconds in which a level reads what it has not read of a row's text."""
        return known.reading * self._unread[row]

    def _worth_reading(
        self, known: Known, chances: list[list[float]], wanted: list[int], rooms: list[int], seconds: float
    ) -> list[int]:
        """The same without rows that would have to be read, unless they win that back in what is left of them."""
        rows = sum(room > 0 for room in rooms)
        price = sum(self._reading(known, b) for b, count in enumerate(wanted) if count)
        read = [[] if self._reading(known, b) else row for b, row in enumerate(chances)]
        others = self._allotted(read, rows, seconds)
        more = self._gain(chances, wanted, rows) - self._gain(read, others, rows)
        more -= (max(wanted) - max(others)) * seconds
        return wanted if more * rounds_ahead(rooms) > price else others

    def _worthwhile(self, rooms: list[int]) -> list[int]:
        """The room of rows in which a token that is surely right would be worth its column, 0 of others."""
        if self._left is None or not self.level.runner.own_rows:
            return rooms
        rows = sum(room > 0 for room in rooms)
        one, more = self.seconds.seconds(rows), self.seconds.seconds(rows + 1)
        hoped = worths(self._left, self.seconds.seconds)
        return [room if worth * one > rows * (more - one) else 0 for room, worth in zip(rooms, hoped, strict=True)]

    def _draft_seconds(self, source: Drafter, known: Known, rows: int, nodes: int) -> float:
        """Of a token of a draft of so many rows."""
        of_pass = self._seconds_of_pass(source, rows)
        if known.seconds is None:
            # Before a draft was timed a token of it is taken to cost a good part of a pass.
            return GUESS * self.seconds.seconds(rows) / max(1, nodes) if of_pass is None else of_pass
        if of_pass is None:
            return known.seconds
        assert self.below is not None
        return known.seconds * of_pass / self.below.seconds(known.rows)

    def _seconds_of_pass(self, source: Drafter, rows: int) -> float | None:
        """Of a level that checks, over a column of each of so many rows; None where nothing is known of that."""
        checks = source is self.level.below and self.below is not None and self.below.informed
        return self.below.seconds(rows) if checks and self.below is not None else None

    def _gain(self, chances: Sequence[Sequence[float]], wanted: Sequence[int], rows: int) -> float:
        """Seconds that a pass over so much of the rows' drafts is expected to win."""
        plain = self.seconds.seconds(rows)
        worth = self.worth or [1.0] * len(wanted)
        expected = sum(
            value * sum(row[:count]) for value, row, count in zip(worth, chances, wanted, strict=True) if count
        )
        return expected * plain / rows - (self._pass_seconds(rows, wanted) - plain)

    def _cost_of_look(self, known: Known) -> float:
        """Seconds that asking a level which tells its drafts' chances is not expected to win back; 0 while that has to
        be found out."""
        seconds = known.seconds or 0.0
        strange = self._turn <= (1 if known.before else PATIENCE)
        return 0.0 if known.gain >= LOOK * seconds or strange else self._at_most_all(LOOK * seconds)

    def _at_most_all(self, seconds: float) -> float:
        """No more than may ever be lost at once: what seemed dear is asked again in the end, and paid for later."""
        return min(seconds, MOST_CREDIT * self._one)

    def _cut(
        self, source: Drafter, known: Known, context: Context, rooms: list[int], offered: Proposal, asked: int
    ) -> Proposal:
        """The columns of a draft that nobody drew, by as many rows as were asked, which are worth their seconds."""
        if offered.q is not None or offered.chances is None:
            return offered
        rows = max(1, sum(room > 0 for room in rooms))
        told = [row[: len(own)] for row, own in zip(offered.chances(), offered.tokens, strict=True)]
        known.sureness.offered(context, offered.tokens, told)
        chances = [known.sureness.corrected(row) for row in told]
        wanted = self._allotted(chances, rows, 0.0)
        # What would be drafted where every row won as much.
        price = min(1.0, self.seconds.seconds(2 * rows) / self.seconds.seconds(rows) - 1)
        promised = sum(chance for row in chances for chance in row if chance >= price)
        self.learnt.promise += NEWEST / 2 * (promised / asked - self.learnt.promise)
        known.looks += 1
        known.gain += max(NEWEST / 2, 1 / known.looks) * (self._gain(chances, wanted, rows) - known.gain)
        left = sum(len(own) - count for own, count in zip(offered.tokens, wanted, strict=True))
        speaker(source).stats.drafted -= left
        return offered.cut(wanted) if left else offered

    def _allotted(self, chances: Sequence[Sequence[float]], rows: int, depth_seconds: float) -> list[int]:
        wide = rows > 1 and not self.level.runner.own_rows
        seconds, worth = self.seconds.seconds, self.worth
        return allotted(chances, seconds, rows, depth_seconds=depth_seconds, rectangular=wide, worth=worth)

    def _pass_seconds(self, rows: int, wanted: Sequence[int]) -> float:
        return self.seconds.seconds(rows + sum(wanted) if self.level.runner.own_rows else rows * (1 + max(wanted)))

    def _time(self, source: Drafter, known: Known, began: float, size: int, wanted: Sequence[int]) -> None:
        """A draft is over; one for which a text was read is no measure of others."""
        seconds = self.level.stats.clock() - began
        if self._on_trial:  # what it had to read of what it had missed is lost as well
            self._credit -= max(0.0, seconds - size * (known.seconds or 0.0))
        if not size:
            return
        asked = [b for b, count in enumerate(wanted) if count]
        count = sum(self._unread[b] for b in asked)
        if count and (known.seconds is None or seconds >= size * known.seconds):
            known.read(seconds, size, count, self._seconds_of_pass(source, len(asked)))
        else:
            known.time(seconds / size, len(asked))
        known.known.update(self._places[b] for b in asked)
