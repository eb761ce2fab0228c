# SPDX-License-Identifier: Apache-2.0
"""Speed-up of one way of decoding over another, from tokens per second on the same questions.

The file stands alone: `evaluate` copies it by itself, so it uses nothing of the package around it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import datasets
import evaluate
import numpy as np
from scipy import stats

_DESCRIPTION = """\
Speed-up of a decoding method over a baseline, measured on the same questions: the mean of the
per-question ratios, and the ratio of the means (the figure Spec-Bench reports), each with a bootstrap
interval over the questions.
"""

_INPUTS = """\
Args:
    predictions (`list` of `float`): tokens per second of the method, one value a question.
    references (`list` of `float`): tokens per second of the baseline on the same questions, same order.
    groups (`list` of `str`, optional): a label a question, such as its task. Adds the figures of every
        group and the mean over the groups.
    confidence (`float`, optional): of the intervals, 0.95 unless told.
    n_resamples (`int`, optional): bootstrap resamples, 10000 unless told.
    seed (`int`, optional): of the resampling, 0 unless told.

Returns:
    mean_of_ratios, ratio_of_means: the two speed-ups, both above 1 when the method is faster.
    mean_of_ratios_interval, ratio_of_means_interval: [low, high], or None for fewer than five questions.
    faster_rate: the share of questions on which the method was faster.
    n_questions, confidence.
    by_group: the same for every label; mean_over_groups: the plain mean of the groups' speed-ups, with
        intervals that resample the questions inside each group. Both only when groups are given.

Example:
    >>> speedup = evaluate.load("speedup")
    >>> result = speedup.compute(predictions=[30.0, 20.0], references=[10.0, 10.0])
    >>> result["mean_of_ratios"]
    2.5
"""

_CITATION = """\
@inproceedings{xia2024unlocking,
    title = "Unlocking Efficiency in Large Language Model Inference:
        A Comprehensive Survey of Speculative Decoding",
    author = "Xia, Heming and others",
    booktitle = "Findings of the Association for Computational Linguistics: ACL 2024",
    year = "2024",
}
"""

MIN_QUESTIONS = 5
"""Fewer cannot carry a 95 % interval: the range of all possible resamples already covers less."""

Statistic = Callable[[np.ndarray, np.ndarray], np.ndarray]


def mean_of_ratios(method: np.ndarray, baseline: np.ndarray) -> np.ndarray:
    """Mean over the last axis of `method / baseline`: `[..., n] -> [...]`."""
    return np.asarray((method / baseline).mean(axis=-1))


def ratio_of_means(method: np.ndarray, baseline: np.ndarray) -> np.ndarray:
    """Mean of `method` over mean of `baseline`, both over the last axis: `[..., n] -> [...]`."""
    return np.asarray(method.mean(axis=-1) / baseline.mean(axis=-1))


def quantile_levels(confidence: float, n: int, strata: int = 1) -> tuple[float, float]:
    """Bootstrap quantiles to read an interval from, widened for few observations.

    The plain percentile interval is too short for small n. The expanded percentile interval (Hesterberg
    2015, "What Teachers Should Know About the Bootstrap") reads the levels Phi(-+ t * sqrt(n / df)),
    which for a mean has the length of Student's interval.

    Args:
        confidence: between 0 and 1.
        n: number of observations.
        strata: how many groups are resampled separately; df = n - strata.

    Returns:
        The lower and the upper level.
    """
    df = n - strata
    lower = float(stats.norm.cdf(-stats.t.ppf((1 + confidence) / 2, df) * math.sqrt(n / df)))
    return lower, 1 - lower


def interval(
    statistic: Statistic,
    strata: Sequence[tuple[np.ndarray, np.ndarray]],
    confidence: float,
    n_resamples: int,
    seed: int,
) -> list[float] | None:
    """Bootstrap interval of the mean over strata of a statistic, questions resampled inside each.

    Args:
        statistic: maps two arrays `[R, n]` to `[R]`.
        strata: for each, tokens per second of method and baseline, both `[n]`.
        confidence: of the interval.
        n_resamples: R.
        seed: of the resampling.

    Returns:
        `[low, high]`, or None where a stratum has fewer than `MIN_QUESTIONS` questions.
    """
    if min(len(method) for method, _ in strata) < MIN_QUESTIONS:
        return None
    rng = np.random.default_rng(seed)
    draws = np.zeros(n_resamples)
    for method, baseline in strata:
        rows = rng.integers(len(method), size=(n_resamples, len(method)))  # [R, n]
        draws += statistic(method[rows], baseline[rows]) / len(strata)
    levels = quantile_levels(confidence, sum(len(method) for method, _ in strata), len(strata))
    low, high = np.quantile(draws, levels)
    return [float(low), float(high)]


def check(
    predictions: Sequence[float],
    references: Sequence[float],
    groups: Sequence[str] | None,
    confidence: float,
    n_resamples: int,
) -> None:
    """Refuse what no speed-up can be computed from.

    Raises:
        ValueError: naming the first thing that is wrong.
    """
    if not len(predictions):
        raise ValueError("speedup needs at least one question.")
    for name, values in (("predictions", predictions), ("references", references)):
        bad = [i for i, value in enumerate(values) if not (math.isfinite(value) and value > 0)]
        if bad:
            raise ValueError(
                f"{name} must be positive finite tokens per second; "
                f"question {bad[0]} (counted from 0) has {values[bad[0]]}."
            )
    if groups is not None and len(groups) != len(predictions):
        raise ValueError(f"groups has {len(groups)} labels for {len(predictions)} questions.")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must lie between 0 and 1, not {confidence}.")
    if n_resamples < 1:
        raise ValueError(f"n_resamples must be at least 1, not {n_resamples}.")


class Speedup(evaluate.Metric):
    """Mean of per-question ratios and ratio of means, with bootstrap intervals."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=datasets.Features(
                {"predictions": datasets.Value("float64"), "references": datasets.Value("float64")}
            ),
            license="Apache-2.0",
            reference_urls=["https://github.com/hemingkx/Spec-Bench"],
        )

    def _compute(
        self,
        predictions: Sequence[float],
        references: Sequence[float],
        groups: Sequence[str] | None = None,
        confidence: float = 0.95,
        n_resamples: int = 10_000,
        seed: int = 0,
    ) -> dict[str, Any]:
        check(predictions, references, groups, confidence, n_resamples)
        method, baseline = np.asarray(predictions, float), np.asarray(references, float)  # [n], [n]
        options = (confidence, n_resamples, seed)
        result = self._figures([(method, baseline)], *options)
        if groups is not None:
            labels = list(dict.fromkeys(groups))
            rows = {label: np.array([group == label for group in groups]) for label in labels}
            strata = {label: (method[rows[label]], baseline[rows[label]]) for label in labels}
            result["by_group"] = {label: self._figures([strata[label]], *options) for label in labels}
            result["mean_over_groups"] = self._figures(list(strata.values()), *options)
        return result

    def _figures(
        self, strata: list[tuple[np.ndarray, np.ndarray]], confidence: float, n_resamples: int, seed: int
    ) -> dict[str, Any]:
        figures: dict[str, Any] = {}
        for name, statistic in (("mean_of_ratios", mean_of_ratios), ("ratio_of_means", ratio_of_means)):
            figures[name] = float(np.mean([statistic(*stratum) for stratum in strata]))
            figures[f"{name}_interval"] = interval(statistic, strata, confidence, n_resamples, seed)
        figures["faster_rate"] = float(np.mean([np.mean(method > plain) for method, plain in strata]))
        figures["n_questions"] = sum(len(method) for method, _ in strata)
        figures["confidence"] = confidence
        return figures
