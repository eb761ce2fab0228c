# SPDX-License-Identifier: Apache-2.0
"""Drawn texts against the exact distribution that plain forward passes give."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
from scipy import stats

import hf_polyspec

Law = dict[tuple[int, ...], float]


@torch.no_grad()
def exact_law(
    model: Any, prompt: torch.Tensor, length: int, vocabulary: int, scores: Callable[[torch.Tensor, torch.Tensor], Any]
) -> Law:
    """Probability of every continuation that has one.

    Args:
        prompt: `[1, L]` ids; length: of continuations.
        scores: of ids `[B, L]` and logits `[B, V]` after them: what is drawn from, before the softmax.
    """
    law: Law = {(): 1.0}
    for _ in range(length):
        prefixes = list(law)
        ids = torch.tensor([prompt[0].tolist() + list(prefix) for prefix in prefixes])
        p = scores(ids, model(ids).logits[:, -1].float()).softmax(-1)
        law = {
            (*prefix, token): law[prefix] * float(p[row, token])
            for (row, prefix), token in itertools.product(enumerate(prefixes), range(vocabulary))
            if p[row, token] > 0
        }
    return law


def drawn(
    model: Any, levels: list[Any], prompt: torch.Tensor, rule: str, length: int, draws: int, **options: Any
) -> Any:
    """So many texts of a chain from one call after a fixed seed, with their statistics.

    Args:
        model: the target; levels: below it; prompt: `[1, L]` ids; rule: of verification; length: of continuations.
    """
    torch.manual_seed(11)
    return hf_polyspec.generate(
        model,
        prompt,
        assistant_models=levels,
        polyspec_verification=rule,
        do_sample=True,
        top_k=0,
        max_new_tokens=length,
        num_return_sequences=draws,
        polyspec_control="fixed",  # how much is drafted is no clock's to say
        return_dict_in_generate=True,
        **options,
    )


def p_value(draws: torch.Tensor, prompt: torch.Tensor, law: Law) -> float:
    """Chi-square of drawn continuations against the law; rare ones are counted together."""
    counts: dict[tuple[int, ...], int] = {}
    for row in draws[:, prompt.shape[1] :].tolist():
        counts[tuple(row)] = counts.get(tuple(row), 0) + 1
    if counts.keys() - law.keys():
        return 0.0  # a continuation of probability zero was drawn
    total = len(draws)
    common = [key for key, probability in law.items() if probability * total >= 5]
    observed = [counts.get(key, 0) for key in common]
    expected = [law[key] * total for key in common]
    rest = total - sum(expected)
    if rest > 1:
        observed.append(total - sum(observed))
        expected.append(rest)
    scale = total / sum(expected)
    return float(stats.chisquare(observed, [value * scale for value in expected]).pvalue)
