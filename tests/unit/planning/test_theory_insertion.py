# SPDX-License-Identifier: Apache-2.0
"""Theorem 3.2: the conditions as printed, where they are right, and where they are not."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_polyspec.planning import theory
from hf_polyspec.planning.theory import Insertion

# The same examples in every run, however busy the machine is.
REPEATABLE = settings(deadline=None, derandomize=True, max_examples=60)

VALUES = st.floats(0.05, 50.0)
INSERTIONS = st.builds(Insertion, VALUES, VALUES, VALUES, VALUES, VALUES, VALUES)
BETAS = st.floats(0.0, 20.0)


def draws(count: int) -> list[tuple[Insertion, float]]:
    """Random numbers of a plausible size, seed 0."""
    source = random.Random(0)
    result = []
    for _ in range(count):
        target = source.uniform(5, 50)
        insertion = Insertion(
            target,
            target * source.uniform(0.05, 1),
            target * source.uniform(0.005, 0.5),
            *(source.uniform(1, 12) for _ in range(3)),
        )
        result.append((insertion, source.uniform(1, 10)))
    return result


@REPEATABLE
@given(INSERTIONS, BETAS)
def test_change_is_the_difference_of_two_lemmas(numbers: Insertion, beta: float) -> None:
    before = theory.lemma_time_per_token((numbers.time_above, numbers.time_below), (numbers.length_before,), beta)
    after = theory.lemma_time_per_token(
        (numbers.time_above, numbers.time_new, numbers.time_below),
        (numbers.length_above, numbers.length_new),
        beta,
    )
    change = theory.lemma_change_above_drafter(numbers, beta)
    assert change == pytest.approx(after - before, rel=1e-9, abs=1e-9 * (before + after))


@REPEATABLE
@given(INSERTIONS)
def test_c1_is_exact_between_verifiers(numbers: Insertion) -> None:
    change = theory.lemma_change_inside(numbers)
    if abs(change) > 1e-9:
        assert theory.condition_c1(numbers).holds == (change < 0)


def test_either_condition_is_sufficient_in_its_own_order_but_both_can_miss() -> None:
    said = {"C1": 0, "C2": 0}
    missed = 0
    for numbers, beta in draws(60_000):
        pays = theory.lemma_change_above_drafter(numbers, beta) < 0
        c1, c2 = theory.condition_c1(numbers).holds, theory.condition_c2(numbers, beta).holds
        if c1 and numbers.length_new >= numbers.length_before:
            said["C1"] += 1
            assert pays
        if c2 and numbers.length_above >= numbers.length_before:
            said["C2"] += 1
            assert pays
        ordered = numbers.length_above > numbers.length_new > numbers.length_before
        missed += ordered and pays and not (c1 or c2)
    assert min(said.values()) > 1_000
    assert missed > 100, "so the printed 'if and only if' is not, even in the paper's order of lengths"


def test_out_of_order_the_conditions_promise_what_does_not_come() -> None:
    broken = {"C1": 0, "C2": 0}
    for numbers, beta in draws(20_000):
        if theory.lemma_change_above_drafter(numbers, beta) < 0:
            continue
        c1, c2 = theory.condition_c1(numbers).holds, theory.condition_c2(numbers, beta).holds
        broken["C1"] += c1 and numbers.length_new < numbers.length_before
        broken["C2"] += c2 and numbers.length_above < numbers.length_before
    assert min(broken.values()) > 100


def test_waste_turns_an_insertion_that_c1_recommends_into_a_loss() -> None:
    # T = (22, 7, 1), drafter agrees with both at 0.75, the target with the middle at 0.85.
    lone = theory.chain_rounds((22.0, 1.0), (0.75,), (5,))[0]
    middle, target = theory.chain_rounds((22.0, 7.0, 1.0), (0.85, 0.75), (10, 5))
    numbers = Insertion(22.0, 7.0, 1.0, lone.length, target.length, middle.length)
    handed = theory.law_mean(theory.block_law(10, middle.law)[0])

    assert theory.lemma_change_above_drafter(numbers, 5) < 0, "the lemma says that it pays"
    change = theory.exact_change(numbers, handed, 5, 5)
    assert change == pytest.approx(target.time_per_token - lone.time_per_token, rel=1e-9)
    assert change > 0, "it does not"


@REPEATABLE
@given(INSERTIONS, st.floats(1.01, 3.0))
def test_critical_length_is_the_edge_of_c1(numbers: Insertion, factor: float) -> None:
    edge = theory.critical_length_before(numbers)

    def at(length: float) -> bool:
        return theory.condition_c1(
            Insertion(
                numbers.time_above, numbers.time_new, numbers.time_below, length, numbers.length_above,
                numbers.length_new,
            )
        ).holds  # fmt: skip

    assert at(edge / factor)
    assert not at(edge * factor)


@REPEATABLE
@given(INSERTIONS, st.floats(1.001, 3.0))
def test_smallest_beta_is_the_edge_of_c2(numbers: Insertion, factor: float) -> None:
    beta = theory.smallest_beta_for_c2(numbers)
    if math.isinf(beta):
        assert not theory.condition_c2(numbers, 1e9).holds
    elif beta < 1e12:
        assert theory.condition_c2(numbers, beta * factor).holds
        assert not theory.condition_c2(numbers, beta / factor).holds


def test_numbers_out_of_range_are_refused() -> None:
    with pytest.raises(ValueError, match="time_new"):
        Insertion(22, 0, 4, 4, 6, 5)
    numbers = Insertion(22, 7, 4, 4.34, 6.26, 4.67)
    with pytest.raises(ValueError, match="beta"):
        theory.condition_c2(numbers, -1.0)
    with pytest.raises(ValueError, match="beta"):
        theory.lemma_change_above_drafter(numbers, math.nan)
    with pytest.raises(ValueError, match=r"6\.26"):
        theory.exact_change(numbers, 4.0, 4, 4)
