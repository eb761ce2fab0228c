# SPDX-License-Identifier: Apache-2.0
"""Deciding which proposed tokens a verifier keeps: pure functions on tensors.

`p` is always the verifier's law and `q` always the proposer's, both after all logits processors. A proposal of K
tokens is judged with K + 1 rows of `p`: row i is the law of the token at position i given the proposal's first i
tokens. Every function returns how many tokens are accepted and the law of the token that follows them.

Exactness: with proposal tokens drawn from `q` (or `q=None`, a proposer that did not draw), the accepted tokens
followed by one token drawn from the returned law are distributed exactly as draws from `p`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .randomness import Randomness


@dataclass(frozen=True)
class Verdict:
    """What a verifier decided about a proposal.

    Attributes:
        accepted: `[B]` int64, number of leading proposal tokens kept.
        following: `[B, V]`, weights of the token after them (the residual after a rejection, else `p`); rows sum to
            a positive number, not necessarily to 1.
    """

    accepted: torch.Tensor
    following: torch.Tensor


def overlap(p: torch.Tensor, q: torch.Tensor | None, tokens: torch.Tensor) -> torch.Tensor:
    """Acceptance probability of each position before its token is drawn: sum of min(p, q) = 1 - TV(p, q).

    The Rao-Blackwellised acceptance rate of Yin et al. 2024 (arXiv 2411.00841), free because both laws are at hand.

    Args:
        p: `[B, K, V]`; q: `[B, K, V]`, or None for a one-hot proposal; tokens: `[B, K]`.

    Returns:
        `[B, K]`.
    """
    if q is None:
        return p.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
    return torch.minimum(p, q).sum(-1)


def verify_tokens(
    tokens: torch.Tensor,
    lengths: torch.Tensor,
    p: torch.Tensor,
    q: torch.Tensor | None,
    randomness: Randomness,
    bias_budget: float = 0.0,
) -> Verdict:
    """Token-by-token speculative sampling (Leviathan et al. 2023, arXiv 2211.17192).

    Position i is accepted with probability b = min(1, p(x)/q(x)); the first rejection ends the proposal and the next
    token comes from max(p - q, 0). With a bias budget lambda it is b + lambda (1 - b), and the token at a judged
    position is then lambda TV(p, q) away from p (Yin et al. 2024, arXiv 2411.00841).

    Args:
        tokens: `[B, K]` proposed ids; entries at or beyond a row's length are ignored.
        lengths: `[B]`, proposal length of each row, 0 to K.
        p: `[B, K + 1, V]` float32 or wider.
        q: `[B, K, V]` in p's dtype, or None for one-hot proposals.
        randomness: source of the coins.
        bias_budget: lambda, 0 (exact) to 1 (nothing is rejected).
    """
    ratio = _ratio(tokens, p, q).clamp(max=1)  # [B, K]
    if bias_budget:
        ratio = ratio + bias_budget * (1 - ratio)
    inside = torch.arange(tokens.shape[1], device=tokens.device) < lengths[:, None]  # [B, K]
    coins = randomness.bernoulli(torch.where(inside, ratio, torch.zeros_like(ratio)))
    accepted = coins.to(torch.int64).cumprod(dim=1).sum(dim=1)  # [B]
    prefix = torch.ones_like(accepted, dtype=p.dtype)
    return Verdict(accepted, _following(accepted, lengths, prefix, tokens, p, q))


def verify_block(
    tokens: torch.Tensor,
    lengths: torch.Tensor,
    p: torch.Tensor,
    q: torch.Tensor,
    randomness: Randomness,
) -> Verdict:
    """Block verification (Sun et al. 2024, arXiv 2403.10444, algorithm 2): never accepts fewer tokens on average.

    With P_i = min(1, P_{i-1} p(x_i)/q(x_i)) and Z_i = sum max(P_i p_{i+1} - q_{i+1}, 0), prefix i passes its own coin
    with probability h_i = Z_i / (Z_i + 1 - P_i), the whole proposal with P_K; the longest passing prefix is kept and
    followed by a draw from max(P_i p_{i+1} - q_{i+1}, 0). Arguments as in `verify_tokens`.
    """
    batch, width = tokens.shape
    ratio = _ratio(tokens, p, q)  # [B, K]
    running = torch.ones(batch, dtype=p.dtype, device=p.device)
    capped = []
    for i in range(width):
        running = (running * ratio[:, i]).clamp(max=1)
        capped.append(running)
    prefix = torch.stack(capped, dim=1)  # [B, K]: P_1 .. P_K
    # Z_i needs q at the position after prefix i, so the last column has none.
    excess = (prefix[:, :-1, None] * p[:, 1:width] - q[:, 1:]).clamp(min=0).sum(-1)  # [B, K - 1]
    denominator = excess + 1 - prefix[:, :-1]
    # 0/0 means P_i = 1 and p = q at the next position: prefix i is then certainly acceptable.
    partial = torch.where(denominator > 0, excess / denominator.clamp(min=torch.finfo(p.dtype).tiny), 1.0)
    pass_probability = torch.cat([partial, prefix[:, -1:]], dim=1)  # [B, K]
    steps = torch.arange(1, width + 1, device=tokens.device)
    pass_probability = torch.where(steps == lengths[:, None], prefix, pass_probability)
    pass_probability = torch.where(steps <= lengths[:, None], pass_probability, 0.0).clamp(0, 1)
    coins = randomness.bernoulli(pass_probability)
    accepted = (coins.to(torch.int64) * steps).amax(dim=1)  # [B], the longest passing prefix, 0 if none
    with_root = torch.cat([torch.ones_like(prefix[:, :1]), prefix], dim=1)  # [B, K + 1]: P_0 .. P_K
    chosen = with_root.gather(1, accepted[:, None]).squeeze(1)
    return Verdict(accepted, _following(accepted, lengths, chosen, tokens, p, q))


def _ratio(tokens: torch.Tensor, p: torch.Tensor, q: torch.Tensor | None) -> torch.Tensor:
    """p(x)/q(x) of each proposed token, `[B, K]`; a token that q excludes cannot have been drawn from q: ratio 0."""
    index = tokens.unsqueeze(-1)
    numerator = p[:, : tokens.shape[1]].gather(-1, index).squeeze(-1)
    if q is None:
        return numerator
    drawn = q.gather(-1, index).squeeze(-1)
    return torch.where(drawn > 0, numerator / drawn.clamp(min=torch.finfo(q.dtype).tiny), 0.0)


def _following(
    accepted: torch.Tensor,
    lengths: torch.Tensor,
    prefix: torch.Tensor,
    tokens: torch.Tensor,
    p: torch.Tensor,
    q: torch.Tensor | None,
) -> torch.Tensor:
    """Weights `[B, V]` of the next token: max(prefix * p - q, 0) after a rejection, else p."""
    rows = torch.arange(p.shape[0], device=p.device)
    law = p[rows, accepted]  # [B, V]
    if tokens.shape[1] == 0:
        return law
    rejected = accepted < lengths  # [B]
    at = accepted.clamp(max=tokens.shape[1] - 1)
    if q is None:
        residual = law.scatter(1, tokens[rows, at][:, None], 0.0)
    else:
        residual = (prefix[:, None] * law - q[rows, at]).clamp(min=0)
    # A rejection whose residual vanished in rounding happens only where p equals q: p is then the right law.
    usable = rejected & (residual.sum(-1) > 0)
    return torch.where(usable[:, None], residual, law)
