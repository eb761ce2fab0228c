# SPDX-License-Identifier: Apache-2.0
"""The verification rules on laws small enough to do by hand. Exactness over chains: tests/distribution."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_polyspec.exactness.randomness import TorchRandomness
from hf_polyspec.exactness.verification import overlap, verify_block, verify_tokens

RULES = [verify_tokens, verify_block]


class Coins:
    """Coins that all fall one way: a coin of probability p is true if p > threshold."""

    def __init__(self, threshold: float) -> None:
        self.threshold = threshold

    def bernoulli(self, probability: torch.Tensor) -> torch.Tensor:
        return torch.full_like(probability, self.threshold) < probability

    def categorical(self, weights: torch.Tensor) -> torch.Tensor:
        return weights.argmax(-1)


def laws(*rows: list[float]) -> torch.Tensor:
    return torch.tensor([rows], dtype=torch.float64)


P = laws([0.1, 0.2, 0.3, 0.4], [0.4, 0.3, 0.2, 0.1], [0.25, 0.25, 0.25, 0.25])
Q = laws([0.4, 0.3, 0.2, 0.1], [0.1, 0.2, 0.3, 0.4])


@pytest.mark.parametrize("rule", RULES)
def test_everything_is_accepted_when_the_laws_agree(rule) -> None:
    verdict = rule(torch.tensor([[1, 2]]), torch.tensor([2]), P, P[:, :2], Coins(0.999999))
    assert verdict.accepted.tolist() == [2]
    assert torch.equal(verdict.following, P[:, 2])


def test_a_rejected_token_is_replaced_from_the_residual() -> None:
    # p/q of token 0 is 1/4: rejected by a coin of 1/2. max(p - q, 0) at the first position is [0, 0, .1, .3].
    verdict = verify_tokens(torch.tensor([[0, 1]]), torch.tensor([2]), P, Q, Coins(0.5))
    assert verdict.accepted.tolist() == [0]
    torch.testing.assert_close(verdict.following, torch.tensor([[0.0, 0.0, 0.1, 0.3]], dtype=torch.float64))


def test_a_one_hot_proposal_leaves_p_without_its_token() -> None:
    verdict = verify_tokens(torch.tensor([[3]]), torch.tensor([1]), P[:, :2], None, Coins(0.5))
    assert verdict.accepted.tolist() == [0]
    torch.testing.assert_close(verdict.following, torch.tensor([[0.1, 0.2, 0.3, 0.0]], dtype=torch.float64))


@pytest.mark.parametrize("rule", RULES)
def test_a_token_the_verifier_excludes_is_never_accepted(rule) -> None:
    p = laws([0.0, 1.0], [0.5, 0.5], [0.5, 0.5])
    q = laws([0.5, 0.5], [0.5, 0.5])
    verdict = rule(torch.tensor([[0, 0]]), torch.tensor([2]), p, q, Coins(0.0))
    assert verdict.accepted.tolist() == [0]
    assert verdict.following.argmax(-1).tolist() == [1]


def test_a_residual_lost_to_rounding_falls_back_on_p() -> None:
    p = laws([0.5, 0.5], [0.5, 0.5])
    verdict = verify_tokens(torch.tensor([[0]]), torch.tensor([1]), p, p[:, :1], Coins(1.0))
    assert verdict.accepted.tolist() == [0]
    assert torch.equal(verdict.following, p[:, 0])


@pytest.mark.parametrize("rule", RULES)
def test_rows_end_where_their_own_proposal_ends(rule) -> None:
    p, q = P.expand(3, -1, -1), P[:, :2].expand(3, -1, -1)
    verdict = rule(torch.tensor([[1, 2], [1, 0], [0, 0]]), torch.tensor([2, 1, 0]), p, q, Coins(0.999))
    assert verdict.accepted.tolist() == [2, 1, 0]
    for row, kept in enumerate((2, 1, 0)):
        assert torch.equal(verdict.following[row], p[row, kept])


def test_block_verification_by_hand() -> None:
    """Ratios 1/4 and 3/2: P = (1/4, 3/8). Z_1 = sum max(p_2/4 - q_2, 0) = 0, so h_1 = 0 and h_2 = 3/8."""
    tokens, lengths = torch.tensor([[0, 1]]), torch.tensor([2])
    assert verify_block(tokens, lengths, P, Q, Coins(0.37)).accepted.tolist() == [2]
    assert verify_block(tokens, lengths, P, Q, Coins(0.38)).accepted.tolist() == [0]
    # Token verification needs a coin below 1/4 at the first token: the block rescues it.
    assert verify_tokens(tokens, lengths, P, Q, Coins(0.37)).accepted.tolist() == [0]


def test_overlap_is_one_minus_total_variation() -> None:
    expected = 1 - 0.5 * (P[:, :2] - Q).abs().sum(-1)
    torch.testing.assert_close(overlap(P[:, :2], Q, torch.zeros(1, 2, dtype=torch.long)), expected)
    torch.testing.assert_close(
        overlap(P[:, :2], None, torch.tensor([[3, 0]])), torch.tensor([[0.4, 0.4]], dtype=torch.float64)
    )


@settings(deadline=None, max_examples=60, derandomize=True)
@given(st.integers(1, 4), st.integers(2, 6), st.integers(0, 10_000), st.booleans())
def test_weights_are_usable_whatever_the_laws(width: int, vocabulary: int, seed: int, sparse: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = 8 * torch.randn(2, 2 * width + 1, vocabulary, generator=generator)
    if sparse:
        logits[logits < 0] = float("-inf")
        logits[..., 0] = 0
    p, q = logits.softmax(-1)[:, : width + 1], logits.softmax(-1)[:, width + 1 :]
    tokens = torch.stack([torch.multinomial(row, 1, generator=generator).squeeze(1) for row in q])
    lengths = torch.tensor([width, width - 1])
    torch.manual_seed(seed)
    for rule in RULES:
        verdict = rule(tokens, lengths, p, q, TorchRandomness())
        assert bool((verdict.accepted <= lengths).all())
        assert bool((verdict.following >= 0).all())
        assert bool((verdict.following.sum(-1) > 0).all())
        at = p[torch.arange(2), verdict.accepted]
        assert bool((verdict.following[at == 0] == 0).all()), "a token outside the verifier's support could be drawn"
