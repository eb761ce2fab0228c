# SPDX-License-Identifier: Apache-2.0
"""Acceptance length: counts worked out by hand, the law it estimates, and refusals."""

from __future__ import annotations

from typing import Any

import evaluate
import numpy as np
import pytest
from scipy import stats

from hf_polyspec.metrics import module_path
from hf_polyspec.metrics.acceptance_length.acceptance_length import pooled_mean_interval


@pytest.fixture(scope="module")
def acceptance_length() -> Any:
    return evaluate.load(module_path("acceptance_length"), keep_in_memory=True)


def test_counts(acceptance_length: Any) -> None:
    found = acceptance_length.compute(predictions=[[3, 1, 4], [], [2, 2]], drafted=[[4, 4, 4], [], [4, 1]])
    assert found["mean_acceptance_length"] == pytest.approx(12 / 5)
    assert found["num_spec_steps"] == 5
    assert found["num_emitted_tokens"] == 12
    assert found["num_accepted_draft_tokens"] == 7
    assert found["acceptance_histogram"] == [1, 2, 1, 1]
    assert found["acceptance_rate_per_position"] == pytest.approx([4 / 5, 2 / 5, 1 / 5, 0])
    assert found["num_draft_tokens"] == 17
    assert found["draft_acceptance_rate"] == pytest.approx(7 / 17)
    assert found["num_generations"] == 2
    assert found["mean_acceptance_length_interval"] is None


def test_passes_without_a_proposal_leave_the_rates(acceptance_length: Any) -> None:
    found = acceptance_length.compute(predictions=[[1, 3, 1]], drafted=[[0, 2, 2]])
    assert found["acceptance_rate_per_position"] == pytest.approx([0.5, 0.5])
    assert found["mean_acceptance_length"] == pytest.approx(5 / 3)
    never = acceptance_length.compute(predictions=[[1, 1]], drafted=[[0, 0]])
    assert never["draft_acceptance_rate"] is None
    assert never["acceptance_rate_per_position"] == []


def test_without_drafted(acceptance_length: Any) -> None:
    found = acceptance_length.compute(predictions=[[3, 1]])
    assert found["acceptance_rate_per_position"] == pytest.approx([0.5, 0.5])
    assert "draft_acceptance_rate" not in found


def test_groups(acceptance_length: Any) -> None:
    found = acceptance_length.compute(predictions=[[3], [1], [5]], groups=["target", "middle", "target"])
    assert found["by_group"]["target"]["mean_acceptance_length"] == 4.0
    assert found["by_group"]["middle"]["mean_acceptance_length"] == 1.0


def test_interval_of_dependent_passes_covers() -> None:
    """Passes of a generation share its acceptance rate: 95 % intervals, 600 trials, seed 0.

    The stated rate of misses is 5 %; the bound leaves the count of a true 5 % out with probability 1e-4.
    Resampling passes one by one, the wrong variant, must fail it.
    """
    rng = np.random.default_rng(0)
    trials, n, passes, misses, wrong = 600, 20, 30, 0, 0
    for trial in range(trials):
        rates = rng.uniform(1, 5, (n, 1))  # mean extra tokens of each generation
        emitted = 1 + rng.poisson(rates, (n, passes))  # [n, P], mean 4
        low, high = pooled_mean_interval(emitted.sum(1), np.full(n, passes), 0.95, 400, trial) or (0.0, 0.0)
        misses += not low <= 4 <= high
        spread = 1.96 * emitted.std() / np.sqrt(emitted.size)
        wrong += abs(emitted.mean() - 4) > spread
    most = stats.binom.ppf(1 - 1e-4, trials, 0.05)
    assert misses <= most
    assert wrong > most


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"predictions": [[2, 0]]}, "at least one token; generation 0"),
        ({"predictions": [[], []]}, "at least one pass"),
        ({"predictions": [[4]], "drafted": [[2]]}, "accepted more tokens than were drafted"),
        ({"predictions": [[4]], "drafted": [[5, 5]]}, "1 passes but 2 drafted"),
        ({"predictions": [[4]], "drafted": []}, "drafted has 0 generations"),
        ({"predictions": [[4]], "groups": ["a", "b"]}, "2 labels for 1 generations"),
        ({"predictions": [[4]], "confidence": 2}, "confidence must lie"),
    ],
)
def test_refusals(acceptance_length: Any, inputs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        acceptance_length.compute(**inputs)
