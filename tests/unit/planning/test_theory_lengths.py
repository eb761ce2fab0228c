# SPDX-License-Identifier: Apache-2.0
"""Accepted length: corrected moments against enumeration and simulation, printed ones shown to fail."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_polyspec.planning import theory

# The same examples in every run, however busy the machine is.
REPEATABLE = settings(deadline=None, derandomize=True, max_examples=60)

AGREEMENTS = st.floats(0.0, 1.0)
PROPOSED = st.integers(0, 40)


def enumerated_moments(agreement: float, proposed: int) -> tuple[float, float]:
    """Mean and mean square over all 2^proposed patterns of accept and reject."""
    mean = square = 0.0
    for pattern in range(2**proposed):
        flags = [bool(pattern >> i & 1) for i in range(proposed)]
        weight = math.prod(agreement if flag else 1 - agreement for flag in flags)
        length = (flags.index(False) if False in flags else proposed) + 1
        mean += weight * length
        square += weight * length**2
    return mean, square


@pytest.mark.parametrize("agreement", [0.0, 0.3, 0.75, 0.95, 1.0])
@pytest.mark.parametrize("proposed", [0, 1, 4, 7])
def test_moments_equal_enumeration(agreement: float, proposed: int) -> None:
    mean, square = enumerated_moments(agreement, proposed)
    assert theory.expected_length(agreement, proposed) == pytest.approx(mean, abs=1e-12)
    assert theory.second_moment(agreement, proposed) == pytest.approx(square, abs=1e-12)
    assert theory.length_variance(agreement, proposed) == pytest.approx(square - mean**2, abs=1e-12)


@REPEATABLE
@given(st.floats(0.01, 0.99), st.integers(1, 40))
def test_closed_forms(a: float, n: int) -> None:
    second = ((1 + a) - (2 * n + 1) * a**n + (2 * n - 1) * a ** (n + 1)) / (1 - a) ** 2
    variance = (a - (2 * n - 1) * a**n * (1 - a) - a ** (2 * n)) / (1 - a) ** 2
    assert theory.second_moment(a, n - 1) == pytest.approx(second, rel=1e-9, abs=1e-9)
    assert theory.length_variance(a, n - 1) == pytest.approx(variance, rel=1e-9, abs=1e-9)


def test_moments_equal_simulation_and_printed_ones_do_not() -> None:
    # Seed 0, 400000 passes; two two-sided tests at 5 standard errors: false alarm below 1.2e-6.
    agreement, proposed, passes = 0.8, 5, 400_000
    coins = torch.rand(passes, proposed, generator=torch.Generator().manual_seed(0)) < agreement
    # [passes]
    lengths = coins.long().cumprod(-1).sum(-1).double() + 1
    mean, variance = float(lengths.mean()), float(lengths.var())
    mean_error = math.sqrt(variance / passes)
    variance_error = math.sqrt((float(((lengths - mean) ** 4).mean()) - variance**2) / passes)

    assert abs(mean - theory.expected_length(agreement, proposed)) < 5 * mean_error
    assert abs(variance - theory.length_variance(agreement, proposed)) < 5 * variance_error
    # The same thresholds reject one token more or less, the printed variance, and the printed roles.
    assert abs(mean - theory.expected_length(agreement, proposed - 1)) > 5 * mean_error
    assert abs(variance - theory.printed_variance(agreement, proposed + 1)) > 5 * variance_error
    assert abs(variance - theory.printed_variance(1 - agreement, proposed + 1)) > 5 * variance_error
    assert abs(mean - theory.printed_mean_length(agreement, proposed + 1)) > 5 * mean_error
    assert theory.printed_mean_length(1 - agreement, proposed + 1) == pytest.approx(
        theory.expected_length(agreement, proposed)
    )


def test_printed_theorem_33_cannot_be_a_variance() -> None:
    assert theory.printed_variance(0.5, 2) == pytest.approx(-0.25)
    assert theory.printed_variance(0.9, 10) == pytest.approx(-5813, abs=0.5)
    assert theory.length_variance(0.5, 1) == pytest.approx(0.25)
    assert theory.length_variance(0.9, 9) == pytest.approx(11.59, abs=0.01)
    assert theory.printed_variance(0.5, 1) == pytest.approx(2.0), "nothing is random at n = 1"
    assert theory.length_variance(0.5, 0) == 0.0
    for alpha in (0.7, 0.8, 0.9, 0.95, 0.99):
        for n in range(2, 13):
            assert theory.printed_variance(alpha, n) < 0 < theory.length_variance(alpha, n - 1)
            assert theory.printed_second_moment(1 - alpha, n) < 0 < theory.second_moment(alpha, n - 1)


@pytest.mark.parametrize(("n", "peak"), [(2, 0.50), (4, 0.73), (6, 0.82), (8, 0.86), (12, 0.91)])
def test_variance_peaks_and_falls(n: int, peak: float) -> None:
    found = theory.least_stable_agreement(n - 1)
    assert found == pytest.approx(peak, abs=0.005)
    top = theory.length_variance(found, n - 1)
    assert top >= max(theory.length_variance(a / 100, n - 1) for a in range(101)) - 1e-12
    assert theory.length_variance(1.0, n - 1) == 0.0


def test_high_agreement_is_stable_only_past_the_peak() -> None:
    assert theory.length_variance(0.95, 7) == pytest.approx(4.9, abs=0.05)
    assert theory.length_variance(0.99, 7) == pytest.approx(1.3, abs=0.05)
    assert theory.length_variance(0.5, 7) < theory.length_variance(0.8, 7)


@REPEATABLE
@given(AGREEMENTS, PROPOSED)
def test_law_is_a_law(agreement: float, proposed: int) -> None:
    law = theory.length_law(agreement, proposed)
    assert len(law) == proposed + 1
    assert min(law) >= 0.0
    assert math.fsum(law) == pytest.approx(1.0, abs=1e-12)
    assert theory.law_mean(law) == pytest.approx(theory.expected_length(agreement, proposed), rel=1e-10)
    assert theory.law_variance(law) >= 0.0


@REPEATABLE
@given(st.lists(AGREEMENTS, max_size=12), st.integers(0, 11), st.floats(0.0, 1.0))
def test_by_position_grows_with_every_agreement(values: list[float], where: int, raised: float) -> None:
    before = theory.law_mean(theory.length_law_by_position(values))
    assert 1.0 - 1e-12 <= before <= len(values) + 1 + 1e-12
    if where < len(values):
        higher = [*values[:where], max(values[where], raised), *values[where + 1 :]]
        assert theory.law_mean(theory.length_law_by_position(higher)) >= before - 1e-12


def test_by_position_is_the_product_of_what_came_before() -> None:
    assert theory.length_law_by_position([0.9, 0.5]) == pytest.approx((0.1, 0.45, 0.45))


@REPEATABLE
@given(AGREEMENTS, st.integers(1, 40))
def test_agreement_for_length_inverts(agreement: float, proposed: int) -> None:
    length = theory.expected_length(agreement, proposed)
    back = theory.agreement_for_length(min(max(length, 1.0), proposed + 1.0), proposed)
    assert theory.expected_length(back, proposed) == pytest.approx(length, rel=1e-9)


@pytest.mark.parametrize("agreement", [1 - 1e-12, 1 - 1e-9, 1e-300])
def test_expected_length_keeps_its_digits_at_the_ends(agreement: float) -> None:
    by_sum = math.fsum(agreement**k for k in range(9))
    assert theory.expected_length(agreement, 8) == pytest.approx(by_sum, rel=1e-13)


@pytest.mark.parametrize(
    "call",
    [
        lambda: theory.expected_length(1.1, 3),
        lambda: theory.expected_length(math.nan, 3),
        lambda: theory.expected_length(0.5, -1),
        lambda: theory.length_law(0.5, -1),
        lambda: theory.length_law_by_position([0.5, -0.1]),
        lambda: theory.agreement_for_length(12.0, 10),
        lambda: theory.agreement_for_length(0.5, 10),
        lambda: theory.least_stable_agreement(0),
        lambda: theory.printed_variance(1.0, 4),
        lambda: theory.printed_mean_length(0.5, 0),
    ],
)
def test_numbers_out_of_range_are_refused(call: object) -> None:
    assert callable(call)
    with pytest.raises(ValueError, match=r"\d"):
        call()
