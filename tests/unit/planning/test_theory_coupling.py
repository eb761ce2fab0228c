# SPDX-License-Identifier: Apache-2.0
"""How often two races over one noise have the same winner: the formula, its bounds, and trials."""

from __future__ import annotations

import pytest
import torch

from hf_polyspec.planning.theory.coupling import coupled_acceptance, coupled_agreement


def laws(size: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    source = torch.Generator().manual_seed(seed)
    p = torch.randn(6, size, generator=source, dtype=torch.float64)
    return p.softmax(-1), (p + torch.randn(6, size, generator=source, dtype=torch.float64)).softmax(-1)


def by_the_letter(p: torch.Tensor, q: torch.Tensor) -> float:
    total = 0.0
    for x in range(len(p)):
        if p[x] > 0 and q[x] > 0:
            total += 1 / sum(max(float(p[y] / p[x]), float(q[y] / q[x])) for y in range(len(p)))
    return total


@pytest.mark.parametrize("size", [2, 3, 17])
def test_the_formula_by_the_letter(size: int) -> None:
    p, q = laws(size, size)
    q[0, 0] = p[1, 1] = 0
    p[2] = q[2]
    p, q = p / p.sum(-1, keepdim=True), q / q.sum(-1, keepdim=True)
    for row, found in enumerate(coupled_acceptance(p, q).tolist()):
        assert found == pytest.approx(by_the_letter(p[row], q[row]), abs=1e-12)
    assert coupled_acceptance(p, q)[2] == pytest.approx(1)


def test_bounds() -> None:
    """(1 - TV) / (1 + TV) from below, 1 - TV from above; for one-hot drafts it is p of the token."""
    p, q = laws(40, 3)
    distance = 0.5 * (p - q).abs().sum(-1)
    found = coupled_acceptance(p, q)
    assert bool((found >= (1 - distance) / (1 + distance) - 1e-12).all())
    assert bool((found <= 1 - distance + 1e-12).all())
    certain = torch.zeros(40, dtype=torch.float64)
    certain[7] = 1
    assert float(coupled_acceptance(p[0], certain)) == pytest.approx(float(p[0, 7]))


def test_agreement_given_what_was_picked() -> None:
    p, q = laws(9, 5)
    each = torch.stack([coupled_agreement(p, q, torch.full((6,), x)) for x in range(9)], dim=-1)
    torch.testing.assert_close((p * each).sum(-1), coupled_acceptance(p, q))
    q[:, 4] = 0
    assert coupled_agreement(p, q / q.sum(-1, keepdim=True), torch.full((6,), 4)).tolist() == [0.0] * 6


def test_trials() -> None:
    """100,000 races: within five standard deviations (a false alarm in 2 million runs, and the seed is fixed)."""
    p, q = (law[0] for law in laws(12, 8))
    noise = torch.empty(100_000, 12, dtype=torch.float64)
    noise.exponential_(1, generator=torch.Generator().manual_seed(1))
    winners = (p / noise).argmax(-1), (q / noise).argmax(-1)
    chance = float(coupled_acceptance(p, q))
    same = float((winners[0] == winners[1]).double().mean())
    assert abs(same - chance) < 5 * (chance * (1 - chance) / 100_000) ** 0.5
    of_one = winners[0] == 3
    given = float(coupled_agreement(p, q, torch.tensor(3)))
    count = int(of_one.sum())
    agreed = float((winners[1][of_one] == 3).double().mean())
    assert abs(agreed - given) < 5 * (given * (1 - given) / count) ** 0.5
