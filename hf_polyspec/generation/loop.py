# SPDX-License-Identifier: Apache-2.0
"""The outer loop: ask the target for rounds until every row is finished.

generate() runs it with a fixed set of rows, an engine with rows that come and go. Whose rows they are, and when they
end, is a `Course`.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Protocol

from ..exactness.context import Context
from ..exactness.distributions import LawMaker
from ..exactness.row_laws import RowLaws
from ..host.moments import one_moment
from ..levels.emission import Emission
from ..levels.undisturbed import asks_nobody
from ..levels.verifier import Verifier
from .course import Course


class Control(Protocol):
    """Decides, between two rounds of the target, how the chain is run."""

    def before(self, context: Context, limits: list[int]) -> None:
        """A round over these rows is about to start; `limits` are the tokens each may still emit."""
        ...

    def after(self, emission: Emission) -> None:
        """The round is over."""
        ...


class DecodingLoop:
    """Runs the rows of a chain.

    Args:
        target: level 0, already begun.
        law: the target's law maker for all rows; set anew by whoever lets rows in or out.
        may_drop_rows: whether finished rows may be taken out of the batch.
        control: steers the chain, or None.
        gate: how far a pass over a row of so many columns may reach (see `host.rope`), or None.

    Attributes:
        seats: whose each row of the batch is, and which of that course's rows.
        context: the rows as levels see them; None before the first.
    """

    def __init__(
        self,
        target: Verifier,
        law: LawMaker,
        *,
        may_drop_rows: bool = False,
        control: Control | None = None,
        gate: Callable[[int], int | None] | None = None,
    ) -> None:
        self.target = target
        self.law = law
        self.may_drop_rows = may_drop_rows
        self.control = control
        self.gate = gate
        self.seats: list[tuple[Course, int]] = []
        self.context: Context | None = None

    def run(self, course: Course, context: Context) -> None:
        """Generate until every row of one course is finished.

        Args:
            course: what becomes of the rows; context: its prompts.
        """
        self.seats = [(course, index) for index in range(context.batch)]
        self.context = context
        in_step = self.law.in_order and context.batch > 1
        self._round_of(course, in_step)
        with one_moment() if not course.finished and self._is_alone(course) else nullcontext():
            while not course.finished:
                self._round_of(course, in_step)
        course.close(self.target.stats)

    def _round_of(self, course: Course, in_step: bool) -> None:
        if course.finished:
            return
        self.round()
        if in_step:
            self._put_in_step(course)
        elif self.may_drop_rows:
            self.drop_finished()

    def _is_alone(self, course: Course) -> bool:
        """Whether no code of the caller's runs until all rows have ended, so that nothing needs to be looked through
        in every pass again."""
        return course.asks_nobody and self.asks_nobody

    @property
    def asks_nobody(self) -> bool:
        """Whether no code of the caller's runs in a round, what courses tell left aside."""
        return self.law.asks_nobody and asks_nobody(self.target)

    def admit(self, course: Course, context: Context) -> None:
        """Rows join behind the others; the law maker has to follow.

        Args:
            course: whose they are; context: their prompts, each of its own length (`Prompt.apart`).
        """
        self.target.add_rows(context.batch)
        self.seats += [(course, index) for index in range(context.batch)]
        self.context = context if self.context is None else self.context.joined(context)

    def round(self) -> Emission:
        """One round of the target over all rows; rows that have just joined are read before others go on.

        What belongs to one course alone and fails, fails that course (`Course.fail`).

        Raises:
            LevelError: a level failed.
        """
        assert self.context is not None, "there are no rows"
        context = self.context
        lengths = [len(ids) for ids in context.ids]
        limits = self._limits(lengths)
        # The pass that reads a prompt for others has nothing to choose, and says nothing of later ones.
        control = None if self.target.reads_for_others(context) else self.control
        if control is not None:
            control.before(context, limits)
        self._look_ahead()
        self.target.scored = any(course.recorder.wanted.any for course, _ in self.seats)
        emission = self.target.round(context, limits, self.law)
        if control is not None:
            control.after(emission)
        self.context = context.extended(emission.tokens)
        self._fail_rows()
        for course, places in self._places():
            if not any(limits[place] for place in places) and len(places) < len(limits):
                continue  # it waited for rows that have joined
            own = emission if len(places) == len(limits) else emission.select(places)
            try:
                course.take([self.seats[place][1] for place in places], own, [lengths[place] for place in places])
            except Exception as error:
                course.fail(error)
        return emission

    def drop_finished(self) -> None:
        """Take rows that draw nothing more out of the batch: they would only cost time."""
        places = [place for place, (course, index) in enumerate(self.seats) if course.limit(index) > 0]
        if places:
            self.keep(places)

    def keep(self, places: list[int]) -> None:
        """Only these rows of the batch go on; there is at least one."""
        assert self.context is not None
        if len(places) < len(self.seats):
            self.target.keep_rows(places)
            self.context = self.context.select(places)
            self.seats = [self.seats[place] for place in places]

    def _places(self) -> list[tuple[Course, list[int]]]:
        """The courses, and where their rows are in the batch."""
        found: dict[int, tuple[Course, list[int]]] = {}
        for place, (course, _) in enumerate(self.seats):
            found.setdefault(id(course), (course, []))[1].append(place)
        return list(found.values())

    def _limits(self, lengths: list[int]) -> list[int]:
        """Most tokens of each row; 0 for those that wait while others, which have joined, are read."""
        limits = [course.limit(index) for course, index in self.seats]
        if len({course.started for course, _ in self.seats}) > 1:
            limits = [0 if course.started else limit for limit, (course, _) in zip(limits, self.seats, strict=True)]
        if self.gate is not None:
            for _, places in self._places():
                gated = self._gated([limits[place] for place in places], [lengths[place] for place in places])
                for place, limit in zip(places, gated, strict=True):
                    limits[place] = limit
        return limits

    def _gated(self, limits: list[int], lengths: list[int]) -> list[int]:
        """Limits with which no pass reaches across a length that it must not; rows meet before they go on beyond it."""
        going = [length for limit, length in zip(limits, lengths, strict=True) if limit]
        if self.gate is None or not going or (end := self.gate(min(going))) is None:
            return limits
        if min(going) == end:
            self.target.runner.stays = end
            return [min(limit, 1) for limit in limits]
        return [max(0, min(limit, end - length)) for limit, length in zip(limits, lengths, strict=True)]

    def _look_ahead(self) -> None:
        """What a round is to ask after each token where processors keep state."""
        if isinstance(self.law, RowLaws):
            rows = zip(self.law.places, self.seats, strict=True)
            self.law.going = {place: course.look_ahead() for place, (course, _) in rows if course.law.in_order}
        else:
            self.target.going = self.seats[0][0].look_ahead() if self.law.in_order else None

    def _fail_rows(self) -> None:
        """Courses whose processors failed in the round."""
        if isinstance(self.law, RowLaws):
            for place, (course, _) in zip(self.law.places, self.seats, strict=True):
                if place in self.law.failures:
                    course.fail(self.law.failures[place])

    def _put_in_step(self, course: Course) -> None:
        """Rows whose processors keep state go on from what all of them have committed."""
        assert self.context is not None
        ids = []
        for b, whole in enumerate(self.context.ids):
            hidden = len(whole) - len(self.context.visible(b))
            ids.append([*whole[:hidden], *course.rows[b].committed])
        self.context = Context(ids, self.context.prompt)
