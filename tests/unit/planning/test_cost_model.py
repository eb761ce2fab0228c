# SPDX-License-Identifier: Apache-2.0
"""The cost model: against the theory where that has an answer, and at its edges."""

from __future__ import annotations

import pytest

from hf_polyspec.planning import Acceptance, Member, SecondsTable, predict
from hf_polyspec.planning.theory import chain_rounds, expected_length


def chain(times: tuple[float, ...], rates: tuple[float, ...]) -> list[Member]:
    """Members with constant passes, a drafter that pays by the token, and one rate for all positions."""
    tables = [SecondsTable.constant(t) for t in times[:-1]] + [SecondsTable.per_token(times[-1])]
    acceptance = [Acceptance(()), *(Acceptance.constant(rate) for rate in rates)]
    return [Member(f"level {i}", t, a) for i, (t, a) in enumerate(zip(tables, acceptance, strict=True))]


@pytest.mark.parametrize(
    ("times", "rates", "sizes"),
    [
        ((22.0, 4.0), (0.7,), (5,)),
        ((22.0, 7.0, 1.0), (0.85, 0.75), (10, 5)),
        ((30.0, 9.0, 3.0, 0.5), (0.9, 0.8, 0.6), (12, 6, 4)),
    ],
)
def test_rounds_are_those_of_the_theory(
    times: tuple[float, ...], rates: tuple[float, ...], sizes: tuple[int, ...]
) -> None:
    found = predict(chain(times, rates), sizes)
    expected = chain_rounds(times, rates, sizes)[-1]
    assert found.tokens == pytest.approx(expected.length)
    assert found.seconds == pytest.approx(expected.cost)
    assert sum(found.by_level) == pytest.approx(found.seconds)
    assert found.tokens_per_second == pytest.approx(1 / expected.time_per_token)


def test_acceptance_by_position_is_used_and_goes_on() -> None:
    falling = Acceptance((0.9, 0.6, 0.3))
    assert falling.mean_length(3) == pytest.approx(1 + 0.9 + 0.6 + 0.3)
    assert falling.at_least(5) == pytest.approx(0.3 * 0.5**2)
    assert sum(falling.law(6)) == pytest.approx(1)
    assert Acceptance(()).mean_length(4) == 1
    assert Acceptance.constant(0.8).mean_length(7) == pytest.approx(expected_length(0.8, 7))
    members = chain((10.0, 1.0), (0.9,))
    assert predict([members[0], Member("d", members[1].table, falling)], (3,)).tokens < predict(members, (3,)).tokens


def test_counters_of_a_level_become_survival() -> None:
    assert Acceptance.from_counts([10, 10, 4], [8, 5, 1]).survival == (0.8, 0.5, 0.25)
    assert Acceptance.from_counts([], []).survival == ()


def test_tables_have_steps_and_go_on() -> None:
    table = SecondsTable(((1, 1.0), (4, 1.0), (5, 3.0)))
    assert [table.seconds(k) for k in (0, 1, 2, 4.5, 5, 6)] == [1, 1, 1, 2, 3, 5]
    assert table.scaled(2).seconds(5) == 6
    # Noise may make the last point fall; beyond it nothing gets cheaper.
    assert SecondsTable(((1, 2.0), (2, 1.0))).seconds(9) == 1


def test_overhead_and_trees_count() -> None:
    members = chain((10.0, 1.0), (0.9,))
    plain = predict(members[:1], ())
    assert (plain.tokens, plain.seconds) == (1, 10)
    assert predict(members, (3,), overhead=0.5).seconds == pytest.approx(predict(members, (3,)).seconds + 0.5)
    tree = predict(members, (3,), drafted=12)
    assert tree.tokens == predict(members, (3,)).tokens
    assert tree.seconds == 22


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: predict(chain((10.0, 1.0), (0.9,)), ()), "2 members need 1 sizes"),
        (lambda: predict(chain((10.0, 5.0, 1.0), (0.9, 0.9)), (0, 2)), r"sizes\[0\]"),
        (lambda: SecondsTable(()), "at least one point"),
        (lambda: SecondsTable(((2, 1.0), (1, 1.0))), "must rise"),
        (lambda: Acceptance((0.5, 0.6)), "must not rise"),
        (lambda: Acceptance((1.5,)), r"survival\[0\]"),
    ],
)
def test_nonsense_is_refused(call: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()  # type: ignore[operator]
