# SPDX-License-Identifier: Apache-2.0
"""Acceptance read off the target's text, against what levels that share one noise really keep."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import torch

from hf_polyspec.planning.readings import agreed, edge, reading_of, survival
from hf_polyspec.planning.texts import Law, Text
from hf_polyspec.planning.theory.coupling import coupled_acceptance

VALUES, LENGTH = 3, 3
TEXTS = list(product(range(VALUES), repeat=LENGTH))
SAMPLED = Law((), True, torch.device("cpu"))


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


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_survival_along_the_text_is_what_is_kept(seed: int) -> None:
    """Averaged over all texts, i tokens survive as often as i drafts in a row are what the target picks.

    Of a draft of two, say: the sum over first tokens of the chance that both levels pick it, times the chance that both
    pick the same after it.
    """
    p, q = laws(seed), laws(seed + 100)
    told = np.zeros(LENGTH)
    real = np.zeros(LENGTH)
    for row, text in enumerate(TEXTS):
        written = Text([1], [*text], 0.1, 0.1, 0.4)
        dice = torch.Generator().manual_seed(0)
        target = reading_of(p[row].log()[None], written, SAMPLED, None, dice)
        weight = float(p[row, :LENGTH].gather(1, torch.tensor(text)[:, None]).prod())
        logs = agreed(target, 0, q[row, :LENGTH].float())
        told += weight * survival(logs[None])[0]
        before = 1.0  # both levels say the text so far
        for place in range(LENGTH):
            same = float(coupled_acceptance(p[row, place], q[row, place]))
            real[place] += before * same / VALUES ** (LENGTH - place)  # counted once for each of its continuations
            p_x, q_x = (law[row, place, text[place]] for law in (p, q))
            before /= float(torch.maximum(p[row, place] / p_x, q[row, place] / q_x).sum())
    np.testing.assert_allclose(told, real, atol=1e-6)
    assert told[0] < 0.95


def test_a_middles_stream_is_picked_with_the_noise_behind_the_text() -> None:
    """20,000 positions: it is the text's token as often as the formula says, and follows the middle's law whatever
    the text; within five standard deviations, and the seed is fixed."""
    count, dice = 20_000, torch.Generator().manual_seed(3)
    p, q = (torch.rand(2, 4, generator=dice) + 0.05).log().softmax(-1)
    new = torch.multinomial(p.expand(count, -1), 1, generator=dice).squeeze(1)
    text = Text([1], new.tolist(), 0.1, 0.1, 0.4)
    target = reading_of(p.log().expand(1, count + 1, 4), text, SAMPLED, None, dice)
    assert torch.equal((target.laws / target.noise).argmax(-1), new)
    middle = reading_of(q.log().expand(1, count + 1, 4), text, SAMPLED, target, dice)
    same = float((middle.stream == new).double().mean())
    chance = float(coupled_acceptance(p, q))
    assert abs(same - chance) < 5 * (chance * (1 - chance) / count) ** 0.5
    for token, expected in enumerate(q.tolist()):
        share = float((middle.stream == token).double().mean())
        assert abs(share - expected) < 5 * (expected * (1 - expected) / count) ** 0.5


def test_a_text_with_ids_that_an_assistant_lacks_is_read_as_one_it_never_offers() -> None:
    text = Text([1, 2], [0, 4, 1, 4], 0.1, 0.1, 0.4)
    dice = torch.Generator().manual_seed(0)
    target = reading_of(torch.randn(1, 5, 5, generator=dice), text, SAMPLED, None, dice)
    smaller = reading_of(torch.randn(1, 5, 3, generator=dice), text, SAMPLED, target, dice)
    assert smaller.laws.shape == (4, 3)
    assert (smaller.stream < 3).all()
    assert np.isneginf(edge(target, smaller)).tolist() == [False, True, False, True]
