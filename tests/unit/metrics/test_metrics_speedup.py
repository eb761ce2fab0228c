# SPDX-License-Identifier: Apache-2.0
"""Speed-up: closed forms, the coverage of its intervals, and refusals."""

from __future__ import annotations

from typing import Any

import evaluate
import numpy as np
import pytest
from scipy import stats

from hf_polyspec.metrics import module_path
from hf_polyspec.metrics.comparison import column, compare
from hf_polyspec.metrics.speedup.speedup import interval, mean_of_ratios, ratio_of_means


@pytest.fixture(scope="module")
def speedup() -> Any:
    return evaluate.load(module_path("speedup"), keep_in_memory=True)


def test_both_means(speedup: Any) -> None:
    found = speedup.compute(predictions=[40.0, 10.0], references=[10.0, 20.0])
    assert found["mean_of_ratios"] == pytest.approx((4 + 0.5) / 2)
    assert found["ratio_of_means"] == pytest.approx(50 / 30)
    assert found["faster_rate"] == 0.5
    assert found["n_questions"] == 2
    assert found["mean_of_ratios_interval"] is None  # two questions carry no interval


def test_constant_ratio_has_an_interval_of_no_width(speedup: Any) -> None:
    found = speedup.compute(predictions=[3.0] * 8, references=[1.5] * 8)
    assert found["mean_of_ratios_interval"] == pytest.approx([2.0, 2.0])
    assert found["ratio_of_means_interval"] == pytest.approx([2.0, 2.0])


def test_groups(speedup: Any) -> None:
    groups = ["a"] * 5 + ["b"] * 10
    found = speedup.compute(predictions=[2.0] * 5 + [6.0] * 10, references=[1.0] * 5 + [2.0] * 10, groups=groups)
    assert found["by_group"]["a"]["mean_of_ratios"] == pytest.approx(2.0)
    assert found["by_group"]["b"]["ratio_of_means"] == pytest.approx(3.0)
    assert found["mean_over_groups"]["mean_of_ratios"] == pytest.approx(2.5)  # not weighted by size
    assert found["mean_of_ratios"] == pytest.approx(40 / 15)


def test_seed_repeats_and_global_state_is_left_alone(speedup: Any) -> None:
    rng = np.random.default_rng(1)
    inputs = {"predictions": rng.uniform(20, 40, 12).tolist(), "references": rng.uniform(9, 11, 12).tolist()}
    assert speedup.compute(**inputs, seed=3) == speedup.compute(**inputs, seed=3)
    assert speedup.compute(**inputs, seed=3) != speedup.compute(**inputs, seed=4)


@pytest.mark.parametrize("statistic", [mean_of_ratios, ratio_of_means])
def test_interval_covers_at_ten_questions(statistic: Any) -> None:
    """Gaussian per-question speeds, 95 % intervals, 1000 trials, seed 0.

    The stated rate of misses is 5 %. The bounds leave the count of a true 5 % out with probability 1e-4;
    the plain percentile interval, the usual variant, misses about 10 % and must fail the same bound.
    """
    rng = np.random.default_rng(0)
    trials, n, misses, plain_misses = 1000, 10, 0, 0
    for trial in range(trials):
        baseline = np.full(n, 10.0)
        method = baseline * rng.normal(2.5, 0.4, n)
        low, high = interval(statistic, [(method, baseline)], 0.95, 500, trial) or (np.nan, np.nan)
        misses += not low <= 2.5 <= high
        rows = rng.integers(n, size=(500, n))
        low, high = np.quantile(statistic(method[rows], baseline[rows]), [0.025, 0.975])
        plain_misses += not low <= 2.5 <= high
    most = stats.binom.ppf(1 - 1e-4, trials, 0.05)
    assert misses <= most
    assert plain_misses > most


def test_module_and_package_agree_on_the_interval() -> None:
    """The module carries its own copy of the interval; both must read the same quantiles."""
    rng = np.random.default_rng(2)
    baseline, method = np.full(12, 1.0), rng.uniform(2, 3, 12)
    alone = interval(mean_of_ratios, [(method, baseline)], 0.9, 40_000, 0)
    package = compare(baseline[:, None], method[:, None], column(0), 0.9, 40_000).interval
    assert alone is not None
    assert package is not None
    assert np.subtract(alone, 1) == pytest.approx(package, abs=0.005)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"predictions": [1.0, 0.0]}, "predictions must be positive.*question 1"),
        ({"references": [float("inf"), 1.0]}, "references must be positive.*question 0"),
        ({"groups": ["a"]}, "1 labels for 2 questions"),
        ({"confidence": 1.0}, "confidence must lie"),
        ({"n_resamples": 0}, "n_resamples must be"),
    ],
)
def test_refusals(speedup: Any, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        speedup.compute(**{"predictions": [1.0, 2.0], "references": [1.0, 1.0], **changes})
