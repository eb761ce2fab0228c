# SPDX-License-Identifier: Apache-2.0
"""How often a verifier says no, and what it costs the text if it is told to say it less often.

After Yin et al., *A Theoretical Perspective for Speculative Decoding Algorithm* (NeurIPS 2024,
arXiv 2411.00841), with the letters of this package: p is the verifier's law, q the proposer's, both after all
logits processors. (That paper has them the other way round.) All functions are pure; laws are tensors
[..., V] that sum to 1 over V, and half precision is computed in float32.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .checks import check_at_least, check_probability


def agreement(p: Tensor, q: Tensor) -> Tensor:
    """Probability that a token drawn from q is accepted against p: sum of min(p, q), which is 1 - TV(p, q).

    As an estimate of acceptance it beats counting accepts: both laws are in memory anyway, and it has none
    of the noise of the coin (a Rao-Blackwell estimate).

    Args:
        p: verifier's laws, [..., V].
        q: proposer's laws, [..., V].

    Returns:
        [...] in [0, 1].

    Raises:
        ValueError: if the tensors are not laws of the same shape.
    """
    p, q = _laws(p, q)
    # [..., V] -> [...]
    return torch.minimum(p, q).sum(-1)


def total_variation(p: Tensor, q: Tensor) -> Tensor:
    """Total variation distance, half the sum of |p - q|.

    Args:
        p: laws, [..., V].
        q: laws, [..., V].

    Returns:
        [...] in [0, 1].

    Raises:
        ValueError: if the tensors are not laws of the same shape.
    """
    p, q = _laws(p, q)
    return (p - q).abs().sum(-1) / 2


def expected_rejections(p: Tensor, q: Tensor) -> Tensor:
    """Expected rejections along texts of the verifier: the sum of total variation over positions.

    E[N_rej] = sum over t of E over x_<t ~ p of TV(p_t, q_t): Theorem 1 of Yin et al. By their Theorem 2 no
    unbiased rule that decides token by token has fewer; it is also what a run without bugs must show
    (:func:`rejection_z_score`). In a chain it holds for every pair of neighbours, because what a level
    hands up follows that level's own law.

    Args:
        p: verifier's laws, [..., T, V], at prefixes drawn from the *verifier* (its own texts).
        q: proposer's laws at the same prefixes, [..., T, V].

    Returns:
        [...] rejections expected in each text; their mean over texts estimates E[N_rej].

    Raises:
        ValueError: if the tensors are not laws of the same shape.
    """
    return total_variation(p, q).sum(-1)


def rejection_z_score(rejected: Tensor, p: Tensor, q: Tensor) -> float:
    """How far a count of rejections lies from Theorem 1, in standard errors.

    z = (sum of rejections - sum of TV) / sqrt(sum of TV (1 - TV)). Given everything before it, each decision
    is a coin with that probability, so z is close to a standard normal: |z| > 5 happens by chance in fewer
    than one of a million runs. Below: too many accepts, a biased text. Above: p or q are not what they are
    said to be (temperature, an offset of one, padding of the vocabulary).

    Args:
        rejected: whether the proposed token was rejected, [N], bool.
        p: verifier's laws at the verified positions, [N, V].
        q: laws the proposed tokens were drawn from, [N, V].

    Returns:
        z; 0 if no position is random and the count is as it must be, infinite if it is not.

    Raises:
        ValueError: if the shapes do not fit.
    """
    distance = total_variation(p, q)
    if rejected.shape != distance.shape:
        raise ValueError(f"rejected has shape {tuple(rejected.shape)}, the laws say {tuple(distance.shape)}.")
    distance = distance.double()
    surplus = float(rejected.double().sum() - distance.sum())
    variance = float((distance * (1 - distance)).sum())
    if variance > 0:
        return surplus / math.sqrt(variance)
    return 0.0 if abs(surplus) < 1e-6 else math.copysign(math.inf, surplus)


def acceptance_probability(p: Tensor, q: Tensor, bias_budget: float = 0.0) -> Tensor:
    """Probability to accept each token, with the honest lossy dial.

    b = min(1, p / q), and b_l = b + lambda (1 - b) for the bias budget lambda. At 0 it is the exact rule of
    speculative sampling; at 1 everything is accepted. With the residual of :func:`rejection_law`, which
    does not change with lambda, P(reject) = (1 - lambda) TV and the bias is lambda TV, exactly.

    At the target this changes the text. At a middle, with the level above testing against
    :func:`emitted_law`, it does not (the lenient middle).

    Args:
        p: verifier's laws, [..., V].
        q: proposer's laws, [..., V].
        bias_budget: lambda, in [0, 1].

    Returns:
        [..., V]; 1 where q is 0, since such a token is never proposed.

    Raises:
        ValueError: if the tensors are not laws of the same shape or the budget is out of range.
    """
    check_probability("bias_budget", bias_budget)
    p, q = _laws(p, q)
    # [..., V]; p >= q must not become p / q, which is 0 / 0 where both are 0.
    exact = torch.where(p >= q, torch.ones_like(p), p / torch.where(q > 0, q, torch.ones_like(q)))
    return exact + bias_budget * (1 - exact)


def rejection_probability(q: Tensor, accept: Tensor) -> Tensor:
    """Probability that a token drawn from q is rejected: sum of q (1 - b).

    Args:
        q: proposer's laws, [..., V].
        accept: b, acceptance probability of each token, [..., V].

    Returns:
        [...] in [0, 1].

    Raises:
        ValueError: if q is no law, or accept no probability of its shape.
    """
    q, accept = _law(q, "q"), _acceptance(accept, q)
    return (q * (1 - accept)).sum(-1)


def rejection_law(p: Tensor, q: Tensor, accept: Tensor) -> Tensor:
    """The best law to draw the recovered token from after a rejection: max(p - b q, 0), normalised.

    Theorem 4 of Yin et al.: it makes the bias as small as it can be for a given b, and 0 where b <= min(1,
    p / q). For :func:`acceptance_probability` at any budget it equals the residual max(p - q, 0),
    normalised.

    Args:
        p: verifier's laws, [..., V].
        q: proposer's laws, [..., V].
        accept: b, acceptance probability of each token, [..., V].

    Returns:
        [..., V]; p itself where nothing is left over, which is never drawn from.

    Raises:
        ValueError: if the tensors are not laws of the same shape, or accept no probability.
    """
    p, q = _laws(p, q)
    left = (p - _acceptance(accept, q) * q).clamp_min(0)
    mass = left.sum(-1, keepdim=True)
    return torch.where(mass > 0, left / torch.where(mass > 0, mass, torch.ones_like(mass)), p)


def emitted_law(p: Tensor, q: Tensor, accept: Tensor) -> Tensor:
    """Law of the token a verifier emits: accepted with probability b, else recovered.

    q_eff(x) = b(x) q(x) + (1 - sum of b q) r(x), r = :func:`rejection_law`. Equal to p for the exact rule.
    For a lenient middle, b > min(1, p / q), it is *not* p, and the level above stays exact only if it tests
    against this law. A bonus token is drawn from p and must be tested against p.

    Args:
        p: verifier's laws, [..., V].
        q: proposer's laws, [..., V].
        accept: b, acceptance probability of each token, [..., V].

    Returns:
        [..., V], summing to 1.

    Raises:
        ValueError: if the tensors are not laws of the same shape, or accept no probability.
    """
    recovered = rejection_law(p, q, accept)
    p, q = _laws(p, q)
    accept = _acceptance(accept, q)
    rejected = rejection_probability(q, accept).unsqueeze(-1)
    return accept * q + rejected * recovered


def smallest_bias(p: Tensor, q: Tensor, accept: Tensor) -> Tensor:
    """Smallest total variation between the emitted law and p that any rejection law can reach for a given b.

    Loss*(b) = 1/2 sum |p - b q| - 1/2 sum (1 - b) q: Theorem 4 of Yin et al., reached by
    :func:`rejection_law`.

    Args:
        p: verifier's laws, [..., V].
        q: proposer's laws, [..., V].
        accept: b, acceptance probability of each token, [..., V].

    Returns:
        [...] in [0, 1].

    Raises:
        ValueError: if the tensors are not laws of the same shape, or accept no probability.
    """
    p, q = _laws(p, q)
    accept = _acceptance(accept, q)
    return ((p - accept * q).abs().sum(-1) - rejection_probability(q, accept)) / 2


def accumulated_bias(p: Tensor, q: Tensor, bias_budget: float) -> Tensor:
    """Expected number of biased tokens along a text: the sum of lambda TV over its positions.

    The law of the whole text is at most this far from the target's in total variation, if prefixes are
    drawn as the lossy run draws them. The bound says nothing once it exceeds 1, so report the number, not a
    promise.

    Args:
        p: verifier's laws, [..., T, V].
        q: proposer's laws, [..., T, V].
        bias_budget: lambda, in [0, 1].

    Returns:
        [...].

    Raises:
        ValueError: if the tensors are not laws of the same shape or the budget is out of range.
    """
    check_probability("bias_budget", bias_budget)
    return bias_budget * expected_rejections(p, q)


class ParetoPoint(NamedTuple):
    """One point of the trade between speed and faithfulness at a position.

    Attributes:
        bias_budget: lambda.
        rejection: probability that the proposed token is rejected.
        bias: total variation between the emitted law and p.
    """

    bias_budget: float
    rejection: float
    bias: float


def pareto_front(p: Tensor, q: Tensor, bias_budgets: Sequence[float]) -> tuple[ParetoPoint, ...]:
    """Rejection against bias: the straight line P(reject) + bias = TV(p, q).

    Theorem 5 of Yin et al.: every rule that accepts more than the exact one, with the best rejection law,
    lies on this line, so no cleverer acceptance does better in total variation than the dial. Both
    coordinates are computed from the laws, not from the line.

    Args:
        p: verifier's law, [V].
        q: proposer's law, [V].
        bias_budgets: values of lambda, each in [0, 1].

    Returns:
        One point for each budget.

    Raises:
        ValueError: if the tensors are not laws over the same vocabulary or a budget is out of range.
    """
    if p.dim() != 1:
        raise ValueError(f"The front belongs to one position: p must have shape [V], got {tuple(p.shape)}.")
    points: list[ParetoPoint] = []
    for budget in bias_budgets:
        accept = acceptance_probability(p, q, budget)
        bias = total_variation(emitted_law(p, q, accept), p)
        points.append(ParetoPoint(budget, float(rejection_probability(q, accept)), float(bias)))
    return tuple(points)


def multi_draft_rejections(p: Tensor, q: Tensor, drafts: int) -> Tensor:
    """Probability that m independent drafts of one token are all rejected, for m = 1, ..., drafts.

    The product of TV(p^m, q), with p^1 = p and p^(m+1) = max(p^m - q, 0) normalised: the one-position part of
    Theorem 3 of Yin et al. It saturates: what no draft can supply stays rejected.

    Args:
        p: verifier's laws, [..., V].
        q: proposer's laws, [..., V].
        drafts: how many tokens are drawn from q and tried in turn, at least 1.

    Returns:
        [..., drafts], never increasing along the last axis.

    Raises:
        ValueError: if the tensors are not laws of the same shape or ``drafts`` is smaller than 1.
    """
    check_at_least("drafts", drafts, 1)
    left, q = _laws(p, q)
    rejected = torch.ones_like(left[..., 0])
    result: list[Tensor] = []
    for _ in range(drafts):
        rejected = rejected * total_variation(left, q)
        result.append(rejected)
        left = rejection_law(left, q, acceptance_probability(left, q))
    return torch.stack(result, dim=-1)


def _laws(p: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
    if p.shape != q.shape:
        raise ValueError(f"p and q must have the same shape, got {tuple(p.shape)} and {tuple(q.shape)}.")
    p, q = _law(p, "p"), _law(q, "q")
    dtype = torch.promote_types(p.dtype, q.dtype)
    return p.to(dtype), q.to(dtype)


def _law(law: Tensor, name: str) -> Tensor:
    if law.dim() == 0 or not law.is_floating_point():
        raise ValueError(f"{name} must be a floating-point tensor of shape [..., V].")
    # A sum over a vocabulary of half-precision numbers is off by more than the differences looked for.
    wide = law.to(torch.promote_types(law.dtype, torch.float32))
    slack = 1e-4 if law.dtype in (torch.float32, torch.float64) else 5e-2
    if not bool(((wide >= 0).all(-1) & ((wide.sum(-1) - 1).abs() <= slack)).all()):
        raise ValueError(f"{name} must hold probabilities that sum to 1 over the last axis.")
    return wide


def _acceptance(accept: Tensor, law: Tensor) -> Tensor:
    if accept.shape != law.shape:
        raise ValueError(f"accept must have the laws' shape {tuple(law.shape)}, got {tuple(accept.shape)}.")
    if not bool(((accept >= 0) & (accept <= 1)).all()):
        raise ValueError("accept must hold probabilities in [0, 1].")
    return accept.to(law.dtype)
