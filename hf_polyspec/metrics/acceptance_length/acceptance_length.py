# SPDX-License-Identifier: Apache-2.0
"""Mean acceptance length and the acceptance figures around it, from the tokens each pass emitted.

The file stands alone: `evaluate` copies it by itself, so it uses nothing of the package around it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import datasets
import evaluate
import numpy as np
from scipy import stats

_DESCRIPTION = """\
Mean acceptance length of speculative decoding: tokens emitted per pass of the verifying model, the
recovered or bonus token included, with a bootstrap interval over the generations, and the histogram and
per-position rates of acceptance. Field names are those of vLLM's speculative decoding metrics.
"""

_INPUTS = """\
Args:
    predictions (`list` of `list` of `int`): one list a generation, holding for every pass of the
        verifying model the tokens that pass emitted (at least 1: its own token).
    drafted (`list` of `list` of `int`, optional): for the same passes, the tokens that were proposed.
        Adds draft_acceptance_rate, and passes without a proposal leave the per-position rates.
    groups (`list` of `str`, optional): a label a generation, such as its task or the level of the
        chain. Adds the figures of every group.
    confidence (`float`, optional): of the interval, 0.95 unless told.
    n_resamples (`int`, optional): bootstrap resamples, 10000 unless told.
    seed (`int`, optional): of the resampling, 0 unless told.

Returns:
    mean_acceptance_length: all emitted tokens over all passes.
    mean_acceptance_length_interval: [low, high], or None for fewer than five generations.
    num_spec_steps, num_emitted_tokens, num_accepted_draft_tokens (emitted minus one a pass).
    acceptance_histogram: entry j is the number of passes that accepted exactly j proposed tokens.
    acceptance_rate_per_position: entry i is the share of passes whose (i+1)-th proposed token was accepted.
    num_draft_tokens, draft_acceptance_rate: only when drafted is given.
    by_group: the same for every label, only when groups are given.

Example:
    >>> acceptance_length = evaluate.load("acceptance_length")
    >>> acceptance_length.compute(predictions=[[3, 1], [4, 2]])["mean_acceptance_length"]
    2.5
"""

_CITATION = """\
@inproceedings{leviathan2023fast,
    title = "Fast Inference from Transformers via Speculative Decoding",
    author = "Leviathan, Yaniv and Kalman, Matan and Matias, Yossi",
    booktitle = "International Conference on Machine Learning",
    year = "2023",
}
"""

MIN_GENERATIONS = 5
"""Fewer cannot carry a 95 % interval: the range of all possible resamples already covers less."""

Lists = Sequence[Sequence[int]]


def pooled_mean_interval(
    emitted: np.ndarray, passes: np.ndarray, confidence: float, n_resamples: int, seed: int
) -> list[float] | None:
    """Bootstrap interval of total emitted over total passes, whole generations resampled.

    Passes of one generation resemble each other, so they may not be resampled one by one. The quantile
    levels are widened for few generations (expanded percentile interval, Hesterberg 2015).

    Args:
        emitted: `[n]` tokens of each generation.
        passes: `[n]` passes of each generation.
        confidence: of the interval.
        n_resamples: bootstrap resamples.
        seed: of the resampling.

    Returns:
        `[low, high]`, or None for fewer than `MIN_GENERATIONS` generations.
    """
    n = len(emitted)
    if n < MIN_GENERATIONS:
        return None
    rows = np.random.default_rng(seed).integers(n, size=(n_resamples, n))  # [R, n]
    means = emitted[rows].sum(axis=1) / passes[rows].sum(axis=1)  # [R]
    wide = float(stats.t.ppf((1 + confidence) / 2, n - 1)) * math.sqrt(n / (n - 1))
    low, high = np.quantile(means, [stats.norm.cdf(-wide), stats.norm.cdf(wide)])
    return [float(low), float(high)]


def check(predictions: Lists, drafted: Lists | None, groups: Sequence[str] | None) -> None:
    """Refuse passes that cannot have happened.

    Raises:
        ValueError: naming the first generation that is wrong.
    """
    if not any(len(row) for row in predictions):
        raise ValueError("acceptance_length needs at least one pass.")
    for i, row in enumerate(predictions):
        if any(emitted < 1 for emitted in row):
            raise ValueError(f"Every pass emits at least one token; generation {i} (counted from 0) has {min(row)}.")
    if groups is not None and len(groups) != len(predictions):
        raise ValueError(f"groups has {len(groups)} labels for {len(predictions)} generations.")
    if drafted is None:
        return
    if len(drafted) != len(predictions):
        raise ValueError(f"drafted has {len(drafted)} generations, predictions {len(predictions)}.")
    for i, (row, proposed) in enumerate(zip(predictions, drafted, strict=True)):
        if len(row) != len(proposed):
            raise ValueError(f"Generation {i} has {len(row)} passes but {len(proposed)} drafted counts.")
        if any(emitted - 1 > count for emitted, count in zip(row, proposed, strict=True)):
            raise ValueError(f"Generation {i} has a pass that accepted more tokens than were drafted.")


def acceptance_figures(predictions: Lists, drafted: Lists | None) -> dict[str, Any]:
    """Count what was emitted and accepted over all passes.

    Args:
        predictions: emitted tokens a pass, one list a generation.
        drafted: proposed tokens for the same passes, if known.

    Returns:
        The counts, the histogram and the per-position rates, under the names the metric returns.
    """
    accepted = np.array([emitted - 1 for row in predictions for emitted in row], dtype=np.int64)  # [P]
    figures: dict[str, Any] = {
        "mean_acceptance_length": 1 + float(accepted.mean()),
        "num_spec_steps": len(accepted),
        "num_emitted_tokens": int(accepted.sum()) + len(accepted),
        "num_accepted_draft_tokens": int(accepted.sum()),
        "acceptance_histogram": np.bincount(accepted).tolist(),
    }
    tried, longest = np.ones(len(accepted), dtype=bool), int(accepted.max())
    if drafted is not None:
        proposed = np.array([count for row in drafted for count in row], dtype=np.int64)  # [P]
        total = int(proposed.sum())
        figures["num_draft_tokens"] = total
        figures["draft_acceptance_rate"] = int(accepted.sum()) / total if total else None
        tried, longest = proposed > 0, int(proposed.max())
    figures["acceptance_rate_per_position"] = [
        float((accepted[tried] > position).mean()) for position in range(longest)
    ]
    return figures


class AcceptanceLength(evaluate.Metric):
    """Tokens emitted per verifying pass, with a bootstrap interval over generations."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=datasets.Features({"predictions": datasets.Sequence(datasets.Value("int64"))}),
            license="Apache-2.0",
            reference_urls=["https://github.com/hemingkx/Spec-Bench"],
        )

    def _compute(
        self,
        predictions: Lists,
        drafted: Lists | None = None,
        groups: Sequence[str] | None = None,
        confidence: float = 0.95,
        n_resamples: int = 10_000,
        seed: int = 0,
    ) -> dict[str, Any]:
        check(predictions, drafted, groups)
        if not 0 < confidence < 1:
            raise ValueError(f"confidence must lie between 0 and 1, not {confidence}.")
        if n_resamples < 1:
            raise ValueError(f"n_resamples must be at least 1, not {n_resamples}.")
        options = (confidence, n_resamples, seed)
        result = self._figures(predictions, drafted, *options)
        if groups is not None:
            result["by_group"] = {}
            for label in dict.fromkeys(groups):
                rows = [i for i, group in enumerate(groups) if group == label and len(predictions[i])]
                if not rows:
                    raise ValueError(f"Group {label!r} has no pass.")
                part = [predictions[i] for i in rows]
                proposed = None if drafted is None else [drafted[i] for i in rows]
                result["by_group"][label] = self._figures(part, proposed, *options)
        return result

    def _figures(
        self, predictions: Lists, drafted: Lists | None, confidence: float, n_resamples: int, seed: int
    ) -> dict[str, Any]:
        figures = acceptance_figures(predictions, drafted)
        filled = [row for row in predictions if len(row)]
        emitted = np.array([sum(row) for row in filled], dtype=np.int64)  # [n]
        passes = np.array([len(row) for row in filled], dtype=np.int64)  # [n]
        figures["mean_acceptance_length_interval"] = pooled_mean_interval(
            emitted, passes, confidence, n_resamples, seed
        )
        figures["num_generations"] = len(filled)
        figures["confidence"] = confidence
        return figures
