# SPDX-License-Identifier: Apache-2.0
"""A lenient middle under an exact top: every path of drafter, middle and target enumerated."""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from hf_polyspec.planning import theory

VOCABULARY, DRAFTED, LENGTH = 2, 2, 3
Prefix = tuple[int, ...]
# (probability, tokens, law the target tests each of them against)
Block = tuple[float, Prefix, list[Tensor]]


class Chain:
    """Random context-dependent laws of target, middle and drafter, and the chain run over every path."""

    def __init__(self, leniency: float, seed: int, test_against_middle: bool) -> None:
        self.leniency, self.seed, self.test_against_middle = leniency, seed, test_against_middle
        self.laws: dict[tuple[int, Prefix], Tensor] = {}

    def law(self, level: int, prefix: Prefix) -> Tensor:
        key = (level, prefix)
        if key not in self.laws:
            # A seed of its own for each context; + 1 keeps (0,) and (0, 0) apart.
            context = sum((token + 1) * 5**i for i, token in enumerate(prefix))
            source = torch.Generator().manual_seed(self.seed * 1_000_003 + context * 7 + level)
            weights = 1.2 * torch.randn(VOCABULARY, generator=source, dtype=torch.float64)
            self.laws[key] = torch.softmax(weights, -1)
        return self.laws[key]

    def blocks(self, prefix: Prefix, done: Prefix = ()) -> Iterator[Block]:
        """Every block the middle can hand up in one round, with the laws of its tokens."""
        here = prefix + done
        p, q = self.law(1, here), self.law(2, here)
        if len(done) == DRAFTED:
            for token in range(VOCABULARY):
                yield float(p[token]), (token,), [p]
            return
        accept = theory.acceptance_probability(p, q, self.leniency)
        recovered = theory.rejection_law(p, q, accept)
        rejected = float(theory.rejection_probability(q, accept))
        handed = p if self.test_against_middle else theory.emitted_law(p, q, accept)
        for token in range(VOCABULARY):
            yield rejected * float(recovered[token]), (token,), [handed]
            weight = float(q[token] * accept[token])
            for rest, tokens, laws in self.blocks(prefix, (*done, token)):
                yield weight * rest, (token, *tokens), [handed, *laws]

    def emissions(self, prefix: Prefix) -> Iterator[tuple[float, Prefix]]:
        """Everything one target pass can emit: accepted tokens of the block and one of its own."""
        for weight, tokens, laws in self.blocks(prefix):
            for position, (token, q) in enumerate(zip(tokens, laws, strict=True)):
                p = self.law(0, prefix + tokens[:position])
                accept = theory.acceptance_probability(p, q)
                refused = weight * (1 - float(accept[token]))
                recovered = theory.rejection_law(p, q, accept)
                for other in range(VOCABULARY):
                    yield refused * float(recovered[other]), (*tokens[:position], other)
                weight *= float(accept[token])
            bonus = self.law(0, prefix + tokens)
            for other in range(VOCABULARY):
                yield weight * float(bonus[other]), (*tokens, other)

    def texts(self) -> dict[Prefix, float]:
        """Law of the first tokens of the text."""
        result: dict[Prefix, float] = defaultdict(float)
        # By length, so that each prefix is complete before it is continued.
        waiting: list[dict[Prefix, float]] = [defaultdict(float) for _ in range(LENGTH)]
        waiting[0][()] = 1.0
        for prefixes in waiting:
            for prefix, weight in prefixes.items():
                for probability, tokens in self.emissions(prefix):
                    text = prefix + tokens
                    whole = len(text) >= LENGTH
                    (result if whole else waiting[len(text)])[text[:LENGTH]] += weight * probability
        return result

    def distance_to_target(self) -> float:
        """Total variation between the text's law and the target's own."""
        texts, total = self.texts(), 0.0
        for text in itertools.product(range(VOCABULARY), repeat=LENGTH):
            own = math.prod(float(self.law(0, text[:i])[text[i]]) for i in range(LENGTH))
            total += abs(texts[text] - own) / 2
        return total

    def middle_rejections(self) -> float:
        p, q = self.law(1, ()), self.law(2, ())
        return float(theory.rejection_probability(q, theory.acceptance_probability(p, q, self.leniency)))


@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.parametrize("leniency", [0.0, 0.3, 1.0])
def test_any_leniency_is_exact_if_the_target_tests_against_what_was_emitted(leniency: float, seed: int) -> None:
    assert Chain(leniency, seed, test_against_middle=False).distance_to_target() < 1e-12


@pytest.mark.parametrize("leniency", [0.3, 1.0])
def test_testing_a_lenient_middle_against_its_own_law_is_biased(leniency: float) -> None:
    distances = [Chain(leniency, seed, test_against_middle=True).distance_to_target() for seed in (1, 2, 3)]
    assert min(distances) > 1e-3
    assert max(distances) > 0.02


def test_without_leniency_both_laws_are_the_same() -> None:
    assert Chain(0.0, 1, test_against_middle=True).distance_to_target() < 1e-12


def test_leniency_saves_rejections_at_the_middle() -> None:
    rejections = [Chain(leniency, 1, False).middle_rejections() for leniency in (0.0, 0.5, 1.0)]
    assert rejections[0] > rejections[1] > rejections[2] == 0.0


def test_emitted_law_is_the_law_of_the_first_token_of_a_block() -> None:
    chain = Chain(0.4, 2, test_against_middle=False)
    first = torch.zeros(VOCABULARY, dtype=torch.float64)
    for weight, tokens, _ in chain.blocks(()):
        first[tokens[0]] += weight
    p, q = chain.law(1, ()), chain.law(2, ())
    accept = theory.acceptance_probability(p, q, 0.4)
    assert torch.allclose(first, theory.emitted_law(p, q, accept), atol=1e-14)
    assert float(theory.total_variation(first, p)) > 1e-3
