# SPDX-License-Identifier: Apache-2.0
"""The paired comparison keeps its false-alarm rate and sees a real difference."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from hf_polyspec.metrics.comparison import column, compare, holm


def solved(rng: np.random.Generator, chance: np.ndarray) -> np.ndarray:
    return (rng.random(len(chance)) < chance).astype(float)[:, None]


def test_equal_systems_keep_the_rate_and_worse_ones_are_seen() -> None:
    """80 questions solved or not, 300 trials at 5 %, seed 0; bounds err with probability 1e-4.

    Ignoring the pairing and the sampling altogether (any difference is a difference) must fail the bound.
    """
    rng = np.random.default_rng(0)
    tests = intervals = careless = seen = 0
    for trial in range(300):
        chance = rng.random(80)
        found = compare(solved(rng, chance), solved(rng, chance), column(0), n_resamples=300, seed=trial)
        assert found.interval is not None
        tests += found.p_value <= 0.05
        intervals += not found.interval[0] <= 0 <= found.interval[1]
        careless += found.difference != 0
        worse = compare(solved(rng, chance), solved(rng, 0.4 * chance), column(0), n_resamples=300, seed=trial)
        seen += worse.p_value <= 0.05 and worse.difference < 0
    most = stats.binom.ppf(1 - 1e-4, 300, 0.05)
    assert tests <= most
    assert intervals <= most
    assert careless > most
    assert seen >= 280


def test_identical_answers_differ_by_nothing() -> None:
    scores = np.random.default_rng(1).random((12, 1))
    found = compare(scores, scores.copy(), column(0, 100.0))
    assert found.difference == 0
    assert found.interval == (0.0, 0.0)
    assert found.p_value == 1.0


def test_scores_and_small_samples() -> None:
    found = compare(np.array([[0.0], [1.0]]), np.array([[1.0], [1.0]]), column(0, 100.0))
    assert (found.baseline, found.method, found.difference) == (50.0, 100.0, 50.0)
    assert found.interval is None
    assert found.n_questions == 2


def test_holm() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.9, 0.8]) == pytest.approx([1.0, 1.0])
    assert holm([]) == []
