# SPDX-License-Identifier: Apache-2.0
"""Whether a faster way of decoding still says what the plain way says: token by token, or in law.

The file stands alone: `evaluate` copies it by itself, so it uses nothing of the package around it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterator, Sequence
from typing import Any

import datasets
import evaluate
import numpy as np

_DESCRIPTION = """\
Losslessness of speculative decoding. The default configuration compares token ids one by one and gives
the position of the first difference (greedy decoding). The configuration "samples" asks whether two sets
of sampled sequences follow the same distribution: a permutation test on token counts, exact at any sample
size, with its p-value.
"""

_INPUTS = """\
Configuration "default": token equality.

Args:
    predictions (`list` of `list` of `int`): generated token ids of the method, one list a prompt.
    references (`list` of `list` of `int`): those of plain decoding on the same prompts, same order.

Returns:
    identical_rate, num_identical, num_compared.
    first_difference: for every prompt the position (from 0) of the first token that differs, which is
        the shorter length where one is the start of the other, or None where both are equal.
    first_difference_tokens: for every prompt [method's id, plain's id] there (None past an end), or None.
    agreeing_prefix_rate: tokens before the first difference, over the tokens of the references.

Configuration "samples": two-sample test.

Args:
    predictions (`list` of `list` of `list` of `int`): for every prompt, the sequences the method drew.
    references (`list` of `list` of `list` of `int`): for every prompt, those drawn plainly. The number of
        sequences may differ. Both sides must have run under the same length limit.
    n_permutations (`int`, optional): 999 unless told; the smallest possible p-value is 1 / (n + 1).
    alpha (`float`, optional): false-alarm rate of `differs`, 0.01 unless told.
    seed (`int`, optional): of the permutations, 0 unless told.

Returns:
    p_value: chance of token counts at least this far apart when both sides follow one distribution.
    differs: whether p_value <= alpha. Equal distributions raise this alarm with probability at most alpha.
    statistic: the standardised distance; family_z: its parts (tokens and pairs by position and prompt,
        tokens over everything), each in standard deviations of its permutations.
    num_predictions, num_references, n_permutations, alpha.

Example:
    >>> losslessness = evaluate.load("losslessness")
    >>> losslessness.compute(predictions=[[5, 6, 7]], references=[[5, 6, 8]])["first_difference"]
    [2]
"""

_CITATION = """\
@book{good2005permutation,
    title = "Permutation, Parametric and Bootstrap Tests of Hypotheses",
    author = "Good, Phillip",
    publisher = "Springer",
    year = "2005",
}
"""

FAMILIES = ("token_at_position", "pair_at_position", "token_anywhere")
END = -1
"""Stands for the end of a sequence, so that lengths are compared too."""
MIN_COUNT = 5
"""Rarer cells are pooled: alone they carry noise and hardly a difference."""


def first_difference(left: Sequence[int], right: Sequence[int]) -> int | None:
    """Position of the first token in which two sequences differ, or None when they are equal."""
    for position, (one, other) in enumerate(zip(left, right, strict=False)):
        if one != other:
            return position
    return None if len(left) == len(right) else min(len(left), len(right))


def compare_tokens(predictions: Sequence[Sequence[int]], references: Sequence[Sequence[int]]) -> dict[str, Any]:
    """Token equality prompt by prompt; the result is described in the module's inputs."""
    if not len(predictions):
        raise ValueError("losslessness needs at least one prompt.")
    positions = [first_difference(*pair) for pair in zip(predictions, references, strict=True)]
    differing: list[list[int | None] | None] = []
    for position, pair in zip(positions, zip(predictions, references, strict=True), strict=True):
        differing.append(
            None if position is None else [side[position] if position < len(side) else None for side in pair]
        )
    agreeing = sum(
        len(reference) if position is None else position
        for position, reference in zip(positions, references, strict=True)
    )
    total = sum(len(reference) for reference in references)
    same = sum(position is None for position in positions)
    return {
        "identical_rate": same / len(positions),
        "num_identical": same,
        "num_compared": len(positions),
        "first_difference": positions,
        "first_difference_tokens": differing,
        "agreeing_prefix_rate": agreeing / total if total else 1.0,
    }


def features(prompt: int, sequence: Sequence[int]) -> Iterator[tuple[int, Hashable, Hashable]]:
    """Cells that one sequence counts towards, as (family, table, category).

    A table is what gets its rare categories pooled: one position of one prompt, or everything.
    """
    previous = None
    for position, token in enumerate([*sequence, END]):
        yield 0, (prompt, position), token
        if previous is not None:
            yield 1, (prompt, position), (previous, token)
        yield 2, None, token
        previous = token


def count_table(prompts: Sequence[Sequence[Sequence[int]]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Number the cells of all sequences, with the rare ones of each table pooled into one.

    Pooling looks only at the counts of both sides together, so it does not disturb the permutation test.

    Args:
        prompts: for every prompt all its sequences, of both sides.

    Returns:
        `owner` `[E]` the sequence each entry belongs to, `cell` `[E]` its cell, `family` `[C]` of each cell.
    """
    entries = [
        (owner, feature)
        for owner, (prompt, sequence) in enumerate((p, s) for p, group in enumerate(prompts) for s in group)
        for feature in features(prompt, sequence)
    ]
    totals = Counter(feature for _, feature in entries)
    index: dict[Hashable, int] = {}
    family: list[int] = []
    cell = np.empty(len(entries), dtype=np.int64)
    for i, (_, feature) in enumerate(entries):
        key: Hashable = feature if totals[feature] >= MIN_COUNT else ("rare", *feature[:2])
        if key not in index:
            index[key] = len(family)
            family.append(feature[0])
        cell[i] = index[key]
    owner = np.array([owner for owner, _ in entries], dtype=np.int64)
    return owner, cell, np.array(family, dtype=np.int64)


def distances(
    owner: np.ndarray, cell: np.ndarray, family: np.ndarray, labels: np.ndarray, share: np.ndarray
) -> np.ndarray:
    """Chi-square distance of the labelled sequences' counts from their share, family by family.

    For a cell counted c times by sequences of which a share s is labelled, (a - s c)^2 / (s (1 - s) c)
    with a the labelled count. The share is each prompt's own, so that prompts may have unequal numbers.

    Args:
        owner: `[E]` sequence of each entry.
        cell: `[E]` cell of each entry.
        family: `[C]` family of each cell.
        labels: `[S]` 1.0 for the method's sequences, 0.0 for the plain ones.
        share: `[S]` the share of labelled sequences in the sequence's prompt.

    Returns:
        `[F]` one distance a family.
    """
    gap = np.bincount(cell, weights=(labels - share)[owner], minlength=len(family))  # [C]
    spread = np.bincount(cell, weights=(share * (1 - share))[owner], minlength=len(family))  # [C]
    return np.bincount(family, weights=gap**2 / spread, minlength=len(FAMILIES))


def permutation_test(
    predictions: Sequence[Sequence[Sequence[int]]],
    references: Sequence[Sequence[Sequence[int]]],
    n_permutations: int,
    seed: int,
) -> tuple[float, np.ndarray]:
    """Test that sampled sequences of both sides are exchangeable within each prompt.

    Tokens of one sequence depend on each other, so whole sequences are relabelled. Each family's distance
    is standardised over all labellings, the observed one among them, and summed; the p-value is the rank
    of the observed sum, hence exact (Good 2005, chapter 3).

    Args:
        predictions: for every prompt the method's sequences.
        references: for every prompt the plain sequences.
        n_permutations: random relabellings.
        seed: of the relabelling.

    Returns:
        The p-value, and `[F]` the observed distances in standard deviations.
    """
    prompts = [[*ours, *plain] for ours, plain in zip(predictions, references, strict=True)]
    sizes = [(len(ours), len(plain)) for ours, plain in zip(predictions, references, strict=True)]
    observed = [np.repeat([1.0, 0.0], size) for size in sizes]
    share = np.concatenate([np.full(ours + plain, ours / (ours + plain)) for ours, plain in sizes])  # [S]
    owner, cell, family = count_table(prompts)
    rng = np.random.default_rng(seed)
    labellings = [observed, *([rng.permutation(block) for block in observed] for _ in range(n_permutations))]
    table = np.stack(
        [distances(owner, cell, family, np.concatenate(blocks), share) for blocks in labellings]
    )  # [1 + R, F]
    spread = table.std(axis=0)
    # A family that no relabelling can move (all its cells are rare) says nothing either way.
    scores = (table - table.mean(axis=0)) / np.where(spread > 1e-9, spread, np.inf)  # [1 + R, F]
    sums = scores.sum(axis=1)  # [1 + R]
    # Equal sums may differ in their last bits; counting them as ties keeps the test exact.
    return float((sums >= sums[0] - 1e-9).mean()), scores[0]


class Losslessness(evaluate.Metric):
    """Token equality, or a two-sample test of sampled sequences in the configuration "samples"."""

    def _info(self) -> evaluate.MetricInfo:
        if self.config_name not in ("default", "samples"):
            raise ValueError(
                f"losslessness knows the configurations 'default' and 'samples', not {self.config_name!r}."
            )
        ids = datasets.Sequence(datasets.Value("int64"))
        column = datasets.Sequence(ids) if self.config_name == "samples" else ids
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=datasets.Features({"predictions": column, "references": column}),
            license="Apache-2.0",
        )

    def _compute(self, predictions: Any, references: Any, **options: Any) -> dict[str, Any]:
        compute = self._compare_samples if self.config_name == "samples" else compare_tokens
        return compute(predictions, references, **options)

    def _compare_samples(
        self,
        predictions: Sequence[Sequence[Sequence[int]]],
        references: Sequence[Sequence[Sequence[int]]],
        n_permutations: int = 999,
        alpha: float = 0.01,
        seed: int = 0,
    ) -> dict[str, Any]:
        if not len(predictions) or not all(map(len, predictions)) or not all(map(len, references)):
            raise ValueError("Both sides need at least one sampled sequence for every prompt.")
        if not 0 < alpha < 1:
            raise ValueError(f"alpha must lie between 0 and 1, not {alpha}.")
        if n_permutations < 1 or 1 / (n_permutations + 1) > alpha:
            raise ValueError(
                f"{n_permutations} permutations cannot reach alpha={alpha}; "
                f"use at least {round(1 / alpha) - 1} (the smallest p-value is 1 / (n_permutations + 1))."
            )
        p_value, scores = permutation_test(predictions, references, n_permutations, seed)
        return {
            "p_value": p_value,
            "differs": p_value <= alpha,
            "statistic": float(scores.sum()),
            "family_z": {name: float(score) for name, score in zip(FAMILIES, scores, strict=True)},
            "num_predictions": sum(map(len, predictions)),
            "num_references": sum(map(len, references)),
            "n_permutations": n_permutations,
            "alpha": alpha,
        }
