# SPDX-License-Identifier: Apache-2.0
"""What passes cost in a chain, where judging comes with them, and how quick the machine is."""

from __future__ import annotations

import pytest

from hf_polyspec.control.ledger import SHARE, START, Account, Ledger
from hf_polyspec.control.pace import SETTLED, Pace


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
