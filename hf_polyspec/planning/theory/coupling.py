# SPDX-License-Identifier: Apache-2.0
"""Acceptance where all levels read the same noise: how often two races over one noise have the same winner.

Of e_x independent and exponential, the winner under p is argmax p_x / e_x, the one under q argmax q_x / e_x. Both are x
where e_y >= e_x max(p_y / p_x, q_y / q_x) for all y, so

    P(both are x) = 1 / sum_y max(p_y / p_x, q_y / q_x),

and a draft is accepted with the sum of that over x (Daliri, Musco and Suresh 2024, arXiv 2408.07978, where the noise is
in Gumbel's form). It is at least (1 - TV) / (1 + TV), and at most 1 - TV, which token verification accepts.
"""

from __future__ import annotations

import torch


def coupled_acceptance(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """Chance that a draft from q is what the level above picks from p, both with the same noise.

    Sorted by p / q, the sums over y are sums of p up to a place and of q beyond it: O(V log V) for all x together.

    Args:
        p, q: `[..., V]`, laws.

    Returns:
        `[...]`.
    """
    p, q = p.double(), q.double()
    both = (p > 0) & (q > 0)
    # where q is 0 the ratio is the largest there is: that p counts in every sum, and x itself in none
    ratio = torch.where(q > 0, p / q.clamp(min=torch.finfo(q.dtype).tiny), torch.inf)
    order = ratio.argsort(-1)
    p, q, both = p.gather(-1, order), q.gather(-1, order), both.gather(-1, order)
    above = p.flip(-1).cumsum(-1).flip(-1) - p  # [..., V], p of those whose ratio is larger
    upto = q.cumsum(-1)
    # sum_y max(p_y / p_x, q_y / q_x): y with the larger ratio gives p_y / p_x, the others q_y / q_x
    tiny = torch.finfo(p.dtype).tiny
    total = above / p.clamp(min=tiny) + upto / q.clamp(min=tiny)
    return torch.where(both, 1 / total, 0.0).sum(-1)


def coupled_agreement(p: torch.Tensor, q: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Chance that a draft from q is the token that the level above has picked from p, both with the same noise.

    Args:
        p, q: `[..., V]`, laws; tokens: `[...]`, which p holds possible.

    Returns:
        `[...]`: 1 / sum_y max(p_y, q_y p_x / q_x), 0 where q_x is 0.
    """
    p, q = p.double(), q.double()
    p_x, q_x = (law.gather(-1, tokens[..., None]) for law in (p, q))
    tiny = torch.finfo(p.dtype).tiny
    total = torch.maximum(p, q * p_x / q_x.clamp(min=tiny)).sum(-1)
    return torch.where(q_x.squeeze(-1) > 0, 1 / total, 0.0)


def noise_behind(p: torch.Tensor, tokens: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Noise as it may have been, given what was picked: a draw of e from its law where argmax p / e is known.

    The winner arrives at a time T that is exponential whoever wins, and the others, who have no memory, at T and
    exponential times of their own after it.

    Args:
        p: `[N, V]`, laws; tokens: `[N]`, what was picked from each; generator: of the draw.

    Returns:
        `[N, V]`, in p's type.
    """
    first = torch.empty_like(p[:, :1]).exponential_(1, generator=generator)
    after = torch.empty_like(p).exponential_(1, generator=generator)
    return p * first + after.scatter(1, tokens[:, None], 0.0)
