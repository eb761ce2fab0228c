# SPDX-License-Identifier: Apache-2.0
"""What passes cost in a chain, where judging comes with them, and how quick the machine is."""

from __future__ import annotations

from functools import partial

import pytest
from clockwork import Clock, OwnRows, Run, Teller

from hf_polyspec.control import Costs, SteadyControl
from hf_polyspec.control.ledger import SHARE, START, Account, Ledger
from hf_polyspec.control.pace import SETTLED, Pace, Usual
from hf_polyspec.exactness.proposal import Proposal
from hf_polyspec.levels.verifier import Verifier
from hf_polyspec.telemetry.counters import Check


def target(columns: float) -> float:
    return 10 + 0.1 * columns


def middle(columns: float) -> float:
    return 4 + 0.1 * columns


def lived(pace: Pace, rounds: int, block: int, judging: float, column: float, slower: float = 1.0) -> None:
    """Rounds of a target over a middle, in whose seconds judging is included."""
    for i in range(rounds):
        for _ in range(block):
            pace.observe(1, 1, slower * (middle(1) + judging + column), offered=0)
        columns = 1 + block + i % 3
        pace.observe(0, columns, slower * (target(columns) + judging + column * columns), offered=columns - 1)


def test_what_judging_costs_is_learnt_of_each_level() -> None:
    pace = Pace([target, middle])
    assert (pace.seconds(0, 5), pace.seconds(1, 1)) == (target(5), middle(1))
    lived(pace, 40, 4, judging=1.0, column=0.9)
    assert pace.seconds(0, 6) == pytest.approx(target(6) + 1 + 0.9 * 6, rel=0.03)
    assert pace.seconds(1, 1) == pytest.approx(middle(1) + 1.9, rel=0.03)
    assert pace.seconds(0, 1) == pytest.approx(target(1) + 1.9, rel=0.15), "none of the passes was over one column"


def test_a_slower_machine_slows_the_levels_that_rest() -> None:
    pace = Pace([target, middle])
    lived(pace, 10, 4, judging=0.0, column=0.0)
    for _ in range(40):
        pace.observe(0, 1, 3 * target(1), offered=0)
    assert pace.seconds(0, 1) == pytest.approx(3 * target(1), rel=0.05)
    assert pace.seconds(1, 1) == pytest.approx(3 * middle(1), rel=0.3)


def test_whether_a_level_or_the_machine_is_slow_is_said_by_the_target() -> None:
    pace = Pace([target, middle])
    pace.observe(1, 1, 3 * middle(1), offered=0)
    assert pace.seconds(1, 1) == middle(1)
    lived(pace, SETTLED, 4, judging=0.0, column=0.0, slower=3.0)
    assert pace.now == pytest.approx(3.0, rel=0.01)
    assert pace.seconds(1, 1) == pytest.approx(3 * middle(1), rel=0.01)


def test_reading_what_was_missed_says_nothing_of_a_check() -> None:
    pace = Pace([target, middle])
    for columns, offered in ((40, 0), (65, 64), (0, 0)):
        pace.observe(0, columns, 1e3, offered)
    pace.observe(2, 1, 1e3, 0)
    assert pace.now == 1.0


def test_an_answer_is_never_further_behind_than_may_be() -> None:
    ledger = Ledger()
    assert ledger.left(2.0) == pytest.approx(2 * START)
    ledger.book(-1.0, 3.0)
    assert ledger.left(2.0) == pytest.approx(2 * START - 1)
    ledger.book(5.0, 997.0)
    assert ledger.left(2.0) == pytest.approx(SHARE * 1000 + 4)


def test_what_a_middle_could_save_is_the_time_of_rounds_of_one_token() -> None:
    account = Account(0.5)
    assert account.idle == 1.0
    for _ in range(30):
        account.book(20.0, 1.5, 25.0)
    assert account.idle == 0.0
    for _ in range(30):
        account.book(0.0, 1.0, 1.0)
        account.book(1.0, 1.0, 2.0)
    assert account.idle == pytest.approx(0.5, abs=0.1)


def _check(rows: int, columns: int, drafted: int = 0, level: int = 0) -> Check:
    of_rows = [drafted, *[0] * (rows - 1)]
    return Check(level, 1, [4] * rows, of_rows, [0] * rows, drafted, [], 1, 1.0, 0.0, columns)


def test_passes_that_are_like_the_last_are_learnt_from_now_and_then() -> None:
    usual = Usual()
    learnt = [not usual.is_like_the_last(_check(8, 8)) for _ in range(9)]
    assert learnt == [True, False, False, False, True, False, False, False, True]
    assert not usual.is_like_the_last(_check(8, 8, drafted=2)), "a draft"
    assert not usual.is_like_the_last(_check(8, 10)), "other columns"
    assert not usual.is_like_the_last(_check(8, 10, level=1)), "another level"
    assert not any(usual.is_like_the_last(_check(1, 1)) for _ in range(5)), "one row is not worth the while"


def test_a_control_learns_from_some_rounds_of_rows_without_drafts(monkeypatch: pytest.MonkeyPatch) -> None:
    learnt: list[int] = []
    monkeypatch.setattr(Costs, "observe", lambda self, *given: learnt.append(1) or 0.0)
    for rows, least, most in ((1, 16, 17), (4, 4, 6)):
        learnt.clear()
        clock = Clock()
        runner = OwnRows(clock, lambda tokens: 1.0, lambda: 1.0, 4)
        top = Verifier(runner, Teller(clock, lambda: 0.0, lambda: 0.0), name="target")
        top.below.propose = lambda context, limits, law: Proposal([[] for _ in limits], None, [[] for _ in limits])  # type: ignore[method-assign]
        costs = Costs([[[1, 1.0], [32, 2.0]]], 0.9)
        Run(clock, top, 16, prompt=1, rows=rows, control=partial(SteadyControl, costs=costs, shares=True))
        assert least <= len(learnt) <= most
