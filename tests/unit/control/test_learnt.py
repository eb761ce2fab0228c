# SPDX-License-Identifier: Apache-2.0
"""What the rounds of one call have shown of drafts for several rows, and the next call begins with."""

from __future__ import annotations

import itertools
import random
import sys
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from clockwork import LAW, Clock, ClockedDrafter, ClockedRunner, OwnRows, Run, Teller, truth

from hf_polyspec.control import Costs, PassSeconds, SteadyControl
from hf_polyspec.control.columns import Columns
from hf_polyspec.control.known import TIMED, Known
from hf_polyspec.control.readiness import unread
from hf_polyspec.exactness.context import Context, Prompt
from hf_polyspec.exactness.passes import Pass
from hf_polyspec.levels.verifier import Verifier

ROWS, LOOK = 8, 0.02
"""A look at drafts takes a fiftieth of a pass of one column."""


def pass_seconds(columns: float) -> float:
    return 0.52 + 0.066 * columns


def flat(columns: float) -> float:
    """Of passes whose columns cost next to nothing."""
    return 0.9 + 0.012 * columns


def costs(middle: float | None = None) -> Costs:
    tables = [[[columns, pass_seconds(columns)] for columns in (1, 2, 4, 8, 16, 32)]]
    if middle is not None:
        tables.append([[columns, middle * seconds] for columns, seconds in tables[0]])
    return Costs(tables, 0.9)


class Looks(Teller):
    """Takes as long for rows that nothing is offered to, and counts."""

    def propose(self, context: Context, limits: list[int], law: object) -> object:  # type: ignore[override]
        offered = super().propose(context, limits, LAW)
        self.clock.now += LOOK - offered.width * self.seconds()
        return offered


def generated(known: Costs, right: Callable[[], float], tokens: int = 64) -> tuple[float, int]:
    """Seconds of eight rows under "auto" in those of the target alone, and looks at drafts."""
    clock = Clock()
    drafter = Looks(clock, lambda: 0.0, right)
    top = Verifier(OwnRows(clock, pass_seconds, lambda: 1.0, 4), drafter, name="target")

    def control(top: Verifier, clock: Clock) -> SteadyControl:
        return SteadyControl(top, known, shares=True, clock=clock)

    run = Run(clock, top, tokens, prompt=1, rows=ROWS, control=control)
    return run.seconds / (tokens * pass_seconds(ROWS)), len(drafter.asked)


def test_a_call_begins_with_what_the_last_one_has_shown() -> None:
    """Where drafts promise nothing, one call has to find that out, and not every one."""
    known = costs()
    first, second = generated(known, lambda: 0.05), generated(known, lambda: 0.05)
    assert first[1] > second[1] + 5
    assert second[0] < first[0] < 1.03
    assert second[0] < 1.005
    assert generated(costs(), lambda: 0.05)[1] == first[1], "another chain knows nothing of it"


def test_a_text_that_repeats_itself_again_is_soon_seen() -> None:
    known = costs()
    fresh = generated(costs(), lambda: 0.95)[0]
    for _ in range(3):
        generated(known, lambda: 0.05)
    assert generated(known, lambda: 0.95)[0] < fresh + 0.05 < 0.8


def test_what_was_timed_once_is_no_measure_for_the_next_call() -> None:
    """It may have compiled something, and a level that seems dear would not be asked again."""
    known = Known(looks=2)
    known.time(40.0, ROWS)
    assert known.carried().seconds is None
    for _ in range(TIMED - 1):
        known.time(0.02, ROWS)
    assert known.carried().seconds == pytest.approx(0.02)
    assert known.carried().before
    known.looks = 0
    assert known.carried().seconds is None, "what a model takes is timed in every call"


def test_what_a_middle_missed_of_each_row_is_counted() -> None:
    """Two rows that it has read, as far as a round leaves behind, and one that it has not."""
    clock = Clock()
    runner = ClockedRunner(clock, pass_seconds, lambda: 1.0, 4)
    ids = [[truth(i) for i in range(length)] for length in (30, 20, 25)]
    runner.memo = [ids[0][:29], ids[1][:17], ids[2][:5]]
    middle = Verifier(runner, ClockedDrafter(clock, lambda: 0.0, lambda: 0.0), name="middle")
    context = Context(ids, Prompt(1, None, torch.zeros(3, 1, dtype=torch.long)))
    assert unread(middle, context, {0, 1, 2}) == [0, 0, 20]
    assert unread(middle.below, context, {1}) == [30, 0, 25]


@pytest.mark.parametrize(("middle", "asked"), [(0.9, False), (0.02, True)])
def test_a_middle_is_asked_where_its_profile_says_that_it_pays(middle: float, asked: bool) -> None:
    """Half right, it wins nothing for rows whose pass it costs nearly whole; before, it had to be asked to be timed."""
    clock = Clock()
    below = OwnRows(clock, lambda columns: middle * pass_seconds(columns), lambda: 0.5, 3)
    level = Verifier(below, Teller(clock, lambda: LOOK, lambda: 0.0), name="middle", block_size=3)
    top = Verifier(OwnRows(clock, pass_seconds, lambda: 1.0, 4), level, name="target")

    def control(top: Verifier, clock: Clock) -> SteadyControl:
        return SteadyControl(top, costs(middle), shares=True, clock=clock)

    Run(clock, top, 32, prompt=1, rows=ROWS, control=control)
    assert bool(below.fed) == asked


def test_rows_that_go_on_are_looked_over_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is not chosen column by column is chosen in one round of four, and as soon as a row has ended."""
    clock, chosen = Clock(), []
    known = costs()
    known.standing.tokens = 100.0
    genuine = SteadyControl._sized
    monkeypatch.setattr(SteadyControl, "_sized", lambda self, place: chosen.append(self._rows) or genuine(self, place))
    top = Verifier(OwnRows(clock, pass_seconds, lambda: 1.0, 4), Looks(clock, lambda: 0.0, lambda: 0.05), name="target")
    top.begin(0, ROWS, 8)
    for level in (top, top.below):
        level.stats.clock = clock
    control = SteadyControl(top, known, shares=True, clock=clock)
    context = Context([[truth(0)] for _ in range(ROWS)], Prompt(1, None, torch.zeros(ROWS, 1, dtype=torch.long)))
    for turn in range(40):
        limits = [100 - turn if turn < 18 or row else 0 for row in range(ROWS)]
        control.before(context, limits)
        emission = top.round(context, limits, LAW)
        control.after(emission)
        context = context.extended(emission.tokens)
        if turn == 18:
            assert chosen[-1] == ROWS - 1
    assert len(chosen) <= 40 // 4 + 3


def test_sizes_of_passes_that_lie_beside_the_line_are_found() -> None:
    gauge = PassSeconds(pass_seconds, by_size=True)
    for _ in range(40):
        gauge.add(8, 2 * pass_seconds(8))
        gauge.add(9, 2 * pass_seconds(9) + 0.3)
    step = gauge.seconds(9) - gauge.seconds(8)
    assert step == pytest.approx(2 * 0.066 + 0.3, rel=0.15)
    plain = PassSeconds(pass_seconds)
    for _ in range(40):
        plain.add(8, 2 * pass_seconds(8))
        plain.add(9, 2 * pass_seconds(9) + 0.3)
    assert plain.seconds(9) - plain.seconds(8) < 0.75 * step, "a line alone does not"


class Slow(ClockedRunner):
    """Some of its passes take five times as long."""

    disturbed: range = range(0)

    def run(self, *given: Any, **named: Any) -> Pass:
        began = self.clock.now
        passed = super().run(*given, **named)
        if len(self.fed) in self.disturbed:
            self.clock.now += 4 * (self.clock.now - began)
        return passed


class SlowRows(Slow, OwnRows):
    """The same, of rows of their own."""


def test_a_middle_that_was_slow_once_is_asked_in_the_next_call() -> None:
    """A good one, while other work was on the machine: what seems dear is not asked, and would be dear for good."""
    points = (1, 2, 4, 8, 16, 32)
    known, speeds = Costs([[[n, flat(n)] for n in points], [[n, 0.12 * flat(n)] for n in points]], 0.9), []
    for disturbed in (range(40, 100), range(0), range(0)):
        clock = Clock()
        below = SlowRows(clock, lambda columns: 0.12 * flat(min(columns, 2 * ROWS)), lambda: 0.9, 3)
        below.disturbed = disturbed
        level = Verifier(below, Teller(clock, lambda: 0.0, lambda: 0.0), name="middle", block_size=3)
        top = Verifier(OwnRows(clock, flat, lambda: 1.0, 4), level, name="target")

        def control(top: Verifier, clock: Clock) -> SteadyControl:
            return SteadyControl(top, known, shares=True, clock=clock)

        run = Run(clock, top, 256, prompt=1, rows=ROWS, control=control)
        speeds.append(256 * flat(ROWS) / run.seconds)
    assert speeds[2] > 1.4
    assert speeds[2] >= speeds[1] > speeds[0]


def test_a_draft_that_seemed_dear_is_cheap_again() -> None:
    """One that was drafted for a text it had missed a part of, and took less than it was said to take without."""
    known = Known()
    known.time(1.0, ROWS)
    clock = Clock()
    runner = OwnRows(clock, lambda columns: 0.0, lambda: 1.0, 4)
    top = Verifier(runner, ClockedDrafter(clock, lambda: 0.01, lambda: 1.0), name="target")
    top.begin(0, 2, 8)
    top.stats.clock = clock
    columns = Columns(top, PassSeconds(pass_seconds))
    columns._unread, columns._places = [9, 0], [0, 1]
    for _ in range(20):
        began, clock.now = clock.now, clock.now + 0.01
        columns._time(top.below, known, began, 1, [1, 0])
    assert known.seconds is not None
    assert known.seconds < 0.05


def test_what_has_no_ids_or_no_cache_is_no_text_that_was_missed() -> None:
    clock = Clock()
    runner = ClockedRunner(clock, pass_seconds, lambda: 1.0, 4)
    middle = Verifier(runner, ClockedDrafter(clock, lambda: 0.0, lambda: 0.0), name="middle")
    context = Context([list(range(30))], Prompt(9, None, torch.zeros(1, 9, dtype=torch.long)))
    assert unread(middle, context, {0}) == [30]
    hidden = Context(context.ids, Prompt(9, None, torch.zeros(1, 9, dtype=torch.long), hidden=9))
    assert unread(middle, hidden, {0}) == [0]
    runner.use_cache = False
    assert unread(middle, context, {0}) == [0]


def test_sizes_that_are_seen_no_more_are_forgotten() -> None:
    gauge = PassSeconds(pass_seconds, by_size=True)
    for columns in range(8, 400):
        gauge.add(columns, pass_seconds(columns))
    assert len(gauge._seen) < 300
    for _ in range(600):
        gauge.add(8, pass_seconds(8))
    assert list(gauge._seen) == [8]


def test_between_sizes_columns_win_no_time_either() -> None:
    gauge, dice = PassSeconds(pass_seconds, by_size=True), random.Random(4)
    for _ in range(200):
        size = dice.choice([8, 24, 56])
        gauge.add(size, 3.0 * dice.uniform(0.95, 1.05))
    found = [gauge.seconds(columns) for columns in range(8, 57)]
    assert all(one <= other for one, other in itertools.pairwise(found))


def test_gauges_may_be_read_while_they_learn() -> None:
    """Two calls on two threads share what is known of a chain; false alarms: none."""
    gauge, failures = PassSeconds(pass_seconds, by_size=True), []
    stop = threading.Event()

    def read() -> None:
        try:
            while not stop.is_set():
                gauge.seconds(13)
                gauge.seconds(29.5)
        except Exception as error:
            failures.append(error)

    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    reader = threading.Thread(target=read)
    reader.start()
    try:
        for turn in range(3000):
            gauge.add(8 + turn % 40, pass_seconds(8))
    finally:
        stop.set()
        reader.join()
        sys.setswitchinterval(before)
    assert not failures


def test_a_row_that_is_left_alone_is_seen_at_once() -> None:
    """It joined beside one that ended as it came: one row went on before, and one goes on now."""
    clock, known = Clock(), costs()
    known.standing.tokens = 100.0
    top = Verifier(OwnRows(clock, pass_seconds, lambda: 1.0, 4), Looks(clock, lambda: 0.0, lambda: 0.05), name="target")
    top.begin(0, 2, 8)
    control = SteadyControl(top, known, shares=True, clock=clock)
    for ids, limits, several in (([0, 0], [50, 50], True), ([0, 0], [0, 50], True), ([0], [50], False)):
        context = Context([[one] for one in ids], Prompt(1, None, torch.zeros(len(ids), 1, dtype=torch.long)))
        for _ in range(2):
            control.before(context, limits)
            assert control._several == several
