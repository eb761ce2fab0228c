# SPDX-License-Identifier: Apache-2.0
"""Acceptance read off the target's text, against the verification rules of the engine with every outcome counted."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import torch

from hf_polyspec.exactness.verification import verify_block, verify_tokens
from hf_polyspec.planning.readings import edge, reading_of, survival
from hf_polyspec.planning.texts import Law, Text

VALUES, LENGTH = 3, 3
TEXTS = list(product(range(VALUES), repeat=LENGTH))


class Coins:
    """Keeps the probabilities it is asked to toss with."""

    def __init__(self) -> None:
        self.asked = torch.empty(0)

    def bernoulli(self, probability: torch.Tensor) -> torch.Tensor:
        self.asked = probability
        return torch.zeros_like(probability, dtype=torch.bool)

    def categorical(self, weights: torch.Tensor) -> torch.Tensor:
        return weights.argmax(-1)


def laws(seed: int) -> torch.Tensor:
    """`[27, 4, 3]`: a random law after every prefix of every text, float64."""
    generator = torch.Generator().manual_seed(seed)
    known: dict[tuple[int, ...], torch.Tensor] = {}

    def after(prefix: tuple[int, ...]) -> torch.Tensor:
        if prefix not in known:
            known[prefix] = torch.rand(VALUES, generator=generator, dtype=torch.float64).pow(2).add(1e-3)
            known[prefix] /= known[prefix].sum()
        return known[prefix]

    return torch.stack([torch.stack([after(text[:i]) for i in range(LENGTH + 1)]) for text in TEXTS])


@pytest.mark.parametrize("block", [True, False])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_survival_along_the_text_is_what_the_rule_accepts(block: bool, seed: int) -> None:
    p, q = laws(seed), laws(seed + 100)
    tokens = torch.tensor(TEXTS)
    at = tokens[:, :, None]
    p_own, q_own = (law[:, :LENGTH].gather(2, at).squeeze(2) for law in (p, q))  # [27, 3]
    coins = Coins()
    (verify_block if block else verify_tokens)(tokens, torch.full((27,), LENGTH), p, q[:, :LENGTH], coins)
    if block:  # the longest prefix whose own coin is heads
        kept = [1 - (1 - coins.asked[:, i:]).prod(1) for i in range(LENGTH)]
    else:
        kept = [coins.asked[:, : i + 1].prod(1) for i in range(LENGTH)]
    real = (q_own.prod(1) * torch.stack(kept)).sum(1).numpy()
    found = survival((q_own.log() - p_own.log()).numpy(), block)
    told = (p_own.prod(1).numpy()[:, None] * found).sum(0)
    np.testing.assert_allclose(told, real, atol=1e-12)
    # The other rule accepts another number: the two are told apart.
    other = survival((q_own.log() - p_own.log()).numpy(), not block)
    assert abs((p_own.prod(1).numpy()[:, None] * other).sum(0)[-1] - real[-1]) > 1e-4


def test_a_text_with_ids_that_an_assistant_lacks_is_read_as_one_it_never_offers() -> None:
    text = Text([1, 2], [0, 4, 1, 4], 0.1, 0.1, 0.4)
    law = Law((), True, torch.device("cpu"))
    dice = torch.Generator().manual_seed(0)
    target = reading_of(torch.randn(1, 5, 5, generator=dice), text, law, None, dice)
    smaller = reading_of(torch.randn(1, 5, 3, generator=dice), text, law, target, dice)
    assert smaller.laws.shape == (4, 3)
    assert (smaller.stream < 3).all()
    assert np.isneginf(edge(target, smaller)).tolist() == [False, True, False, True]
