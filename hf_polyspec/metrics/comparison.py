# SPDX-License-Identifier: Apache-2.0
"""Two systems on the same questions: the difference of a score, its interval, and a paired test."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
from scipy import stats

Array: TypeAlias = npt.NDArray[np.float64]
Combine: TypeAlias = Callable[[Array, int], Array]
"""From sufficient statistics summed over n questions, `[R, S]` and n, to scores `[R]`."""

MIN_QUESTIONS = 5
"""Fewer cannot carry a 95 % interval: the range of all possible resamples already covers less."""


@dataclass(frozen=True)
class Difference:
    """A score of two systems on the same questions.

    Attributes:
        baseline: score of the baseline.
        method: score of the method.
        difference: method minus baseline.
        interval: bootstrap interval of the difference, None for fewer than five questions.
        p_value: of the paired randomisation test that which system wrote which answer does not matter.
        n_questions: questions both answered.
    """

    baseline: float
    method: float
    difference: float
    interval: tuple[float, float] | None
    p_value: float
    n_questions: int


def column(index: int, scale: float = 1.0) -> Combine:
    """The score that is simply the mean of one statistic, times a scale."""
    return lambda totals, n: totals[:, index] * scale / n


def compare(
    baseline: Array,
    method: Array,
    combine: Combine,
    confidence: float = 0.95,
    n_resamples: int = 2000,
    seed: int = 0,
) -> Difference:
    """Compare two systems from their sufficient statistics question by question.

    Args:
        baseline: `[Q, S]` statistics of the baseline's answers.
        method: `[Q, S]` those of the method's answers to the same questions.
        combine: from summed statistics to the score; a corpus score such as BLEU is not a mean of scores.
        confidence: of the interval.
        n_resamples: of the bootstrap and of the test.
        seed: of both.

    Returns:
        The scores, their difference with its interval, and the p-value.
    """
    rng = np.random.default_rng(seed)
    n = len(baseline)
    both = [float(combine(side.sum(axis=0, keepdims=True), n)[0]) for side in (baseline, method)]
    difference = both[1] - both[0]
    interval = None
    if n >= MIN_QUESTIONS:
        weights = rng.multinomial(n, np.full(n, 1 / n), size=n_resamples).astype(np.float64)  # [R, Q]
        draws = combine(weights @ method, n) - combine(weights @ baseline, n)  # [R]
        wide = float(stats.t.ppf((1 + confidence) / 2, n - 1)) * math.sqrt(n / (n - 1))
        low, high = np.quantile(draws, [stats.norm.cdf(-wide), stats.norm.cdf(wide)])
        interval = (float(low), float(high))
    p_value = randomization_p_value(baseline, method, combine, difference, n_resamples, rng)
    return Difference(both[0], both[1], difference, interval, p_value, n)


def randomization_p_value(
    baseline: Array,
    method: Array,
    combine: Combine,
    difference: float,
    n_resamples: int,
    rng: np.random.Generator,
) -> float:
    """Approximate randomisation: swap the two answers of a question at random (Noreen 1989).

    Exact at any number of questions: under equal laws, P(p <= a) <= a. It may be lower than a where
    many differences tie.

    Args:
        baseline: `[Q, S]`.
        method: `[Q, S]`.
        combine: from summed statistics to the score.
        difference: the observed one.
        n_resamples: random swaps.
        rng: their source.

    Returns:
        The two-sided p-value, at least 1 / (n_resamples + 1).
    """
    n = len(baseline)
    swap = rng.integers(2, size=(n_resamples, n)).astype(np.float64)  # [R, Q]
    moved = swap @ (method - baseline)  # [R, S]
    draws = combine(method.sum(axis=0) - moved, n) - combine(baseline.sum(axis=0) + moved, n)  # [R]
    extreme = int((np.abs(draws) >= abs(difference) - 1e-9).sum())
    return (1 + extreme) / (1 + n_resamples)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's adjusted p-values: testing them all at a raises any false alarm with probability at most a."""
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    adjusted = [0.0] * len(p_values)
    running = 0.0
    for rank, i in enumerate(order):
        running = max(running, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = running
    return adjusted
