# SPDX-License-Identifier: Apache-2.0
"""How many tokens a pass emits.

A verifier is offered ``proposed`` tokens and takes each with probability ``agreement``, stopping at the
first it does not take; then it adds one token of its own. With ``n = proposed + 1`` it emits between 1 and
n tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from .checks import check_at_least, check_positive, check_probability


def expected_length(agreement: float, proposed: float) -> float:
    """Mean number of tokens a pass emits, its own token included.

    g(a, L) = (1 - a^(L+1)) / (1 - a), which is L + 1 at a = 1: equation 1 of Leviathan et al. 2023
    (arXiv 2211.17192), and the mean in Theorem 3.3 of the paper once a is read as the accept rate.

    Args:
        agreement: a, the probability that one proposed token is accepted, in [0, 1].
        proposed: L, tokens offered to the pass. A mean block length (not an integer) gives an upper bound,
            because g is concave in L.

    Returns:
        Tokens per pass, between 1 and ``proposed + 1``.

    Raises:
        ValueError: if a number is out of range.
    """
    check_probability("agreement", agreement)
    check_at_least("proposed", proposed, 0)
    if agreement == 0.0 or proposed == 0:
        return 1.0
    if agreement == 1.0:
        return proposed + 1.0
    # expm1 keeps the digits that 1 - a**n loses when a is close to 1.
    return -math.expm1((proposed + 1) * math.log(agreement)) / (1.0 - agreement)


def length_law(agreement: float, proposed: int) -> tuple[float, ...]:
    """Law of the number of tokens a pass emits.

    P(N = k) = a^(k-1) (1 - a) for k < n and a^(n-1) for k = n, with n = proposed + 1: the law behind
    Theorem 3.3 of the paper, with the roles of accept and reject put right.

    Args:
        agreement: a, the probability that one proposed token is accepted, in [0, 1].
        proposed: tokens offered to the pass.

    Returns:
        n probabilities; entry k - 1 belongs to k tokens.

    Raises:
        ValueError: if a number is out of range.
    """
    check_at_least("proposed", proposed, 0)
    return length_law_by_position([agreement] * proposed)


def length_law_by_position(agreements: Sequence[float]) -> tuple[float, ...]:
    """Law of the number of tokens a pass emits when agreement depends on the position in the draft.

    P(N >= k) = a_1 a_2 ... a_(k-1). Drafters agree less the further they run ahead, so a single agreement for
    all positions predicts too much; measured agreements by position do not.

    Args:
        agreements: for each proposed token in order, the probability that it is accepted given that all
            before it were.

    Returns:
        ``len(agreements) + 1`` probabilities; entry k - 1 belongs to k tokens.

    Raises:
        ValueError: if one of them is no probability.
    """
    reached = 1.0
    law: list[float] = []
    for position, value in enumerate(agreements):
        check_probability(f"agreement at position {position}", value)
        law.append(reached * (1.0 - value))
        reached *= value
    return (*law, reached)


def law_mean(law: Sequence[float]) -> float:
    """Mean of a law over 1, 2, ..., n.

    Args:
        law: entry k - 1 is the probability of k.

    Returns:
        sum of k P(N = k).
    """
    return math.fsum(k * probability for k, probability in enumerate(law, start=1))


def law_variance(law: Sequence[float]) -> float:
    """Variance of a law over 1, 2, ..., n, summed around the mean so that it can never be negative.

    Args:
        law: entry k - 1 is the probability of k.

    Returns:
        sum of (k - mean)^2 P(N = k).
    """
    mean = law_mean(law)
    return math.fsum((k - mean) ** 2 * probability for k, probability in enumerate(law, start=1))


def second_moment(agreement: float, proposed: int) -> float:
    """Mean square of the number of tokens a pass emits.

    E[N^2] = ((1 + a) - (2n + 1) a^n + (2n - 1) a^(n+1)) / (1 - a)^2 with n = proposed + 1, the correction
    of what Theorem 3.3 prints (see :func:`printed_second_moment`). Summed over the law, which has no 0 / 0
    at a = 1.

    Args:
        agreement: a, the probability that one proposed token is accepted, in [0, 1].
        proposed: tokens offered to the pass.

    Returns:
        Tokens squared.

    Raises:
        ValueError: if a number is out of range.
    """
    law = length_law(agreement, proposed)
    return math.fsum(k * k * probability for k, probability in enumerate(law, start=1))


def length_variance(agreement: float, proposed: int) -> float:
    """Variance of the number of tokens a pass emits.

    Var N = (a - (2n - 1) a^n (1 - a) - a^(2n)) / (1 - a)^2 with n = proposed + 1, the correction of what
    Theorem 3.3 prints (see :func:`printed_variance`). It rises with a, peaks at
    :func:`least_stable_agreement` and falls to 0 at a = 1, so "more agreement is more stable", as the paper
    says, is true only past the peak.

    Args:
        agreement: a, the probability that one proposed token is accepted, in [0, 1].
        proposed: tokens offered to the pass.

    Returns:
        Tokens squared.

    Raises:
        ValueError: if a number is out of range.
    """
    return law_variance(length_law(agreement, proposed))


def least_stable_agreement(proposed: int) -> float:
    """Agreement at which the number of emitted tokens varies most.

    Args:
        proposed: tokens offered to the pass, at least 1.

    Returns:
        The maximiser of :func:`length_variance` over agreement: 1/2 for one token, towards 1 for many.

    Raises:
        ValueError: if ``proposed`` is smaller than 1.
    """
    check_at_least("proposed", proposed, 1)
    low, high = 0.0, 1.0
    while high - low > 1e-9:
        left, right = low + (high - low) / 3, high - (high - low) / 3
        if length_variance(left, proposed) < length_variance(right, proposed):
            low = left
        else:
            high = right
    return (low + high) / 2


def agreement_for_length(length: float, proposed: int) -> float:
    """Agreement that yields a given mean length: the inverse of :func:`expected_length`.

    Args:
        length: mean tokens per pass, between 1 and ``proposed + 1``.
        proposed: tokens offered to the pass, at least 1.

    Returns:
        a with g(a, proposed) = length.

    Raises:
        ValueError: if no agreement yields that length.
    """
    check_at_least("proposed", proposed, 1)
    if not 1.0 <= length <= proposed + 1.0:
        raise ValueError(f"A pass over {proposed} tokens emits between 1 and {proposed + 1}, never {length}.")
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        if expected_length(middle, proposed) < length:
            low = middle
        else:
            high = middle
    return high


def printed_mean_length(p: float, n: int) -> float:
    """Mean of the accepted length as Theorem 3.3 prints it: (1 - (1 - p)^n) / p.

    The paper calls p = 1 - alpha the acceptance probability. The formula is right only if p is the
    probability of *rejection*: it is the mean of a law that stops with probability p.

    Args:
        p: what the paper calls the acceptance probability, in (0, 1].
        n: trials, draft length + 1.

    Returns:
        The printed mean.

    Raises:
        ValueError: if a number is out of range.
    """
    _check_printed(1.0 - p, n)
    return (1.0 - (1.0 - p) ** n) / p


def printed_second_moment(p: float, n: int) -> float:
    """Mean square of the accepted length as Theorem 3.3 prints it. Wrong: use :func:`second_moment`.

    (1 - (1-p)^n (n^2 + 2n - 1) + 2 (1-p)^(n+1) (n - 1)) / p^2. It is negative wherever few
    are rejected: at every p <= 0.3 for n = 2, ..., 12.

    Args:
        p: what the paper calls the acceptance probability, in (0, 1].
        n: trials, draft length + 1.

    Returns:
        The printed value, kept for comparison only.

    Raises:
        ValueError: if a number is out of range.
    """
    _check_printed(1.0 - p, n)
    stay = 1.0 - p
    return (1.0 - stay**n * (n * n + 2 * n - 1) + 2.0 * stay ** (n + 1) * (n - 1)) / p**2


def printed_variance(alpha: float, n: int) -> float:
    """Variance of the accepted length as Theorem 3.3 prints it. Wrong: use :func:`length_variance`.

    alpha (1 - (n^2 - 1) alpha^n - (n^2 - 1) alpha^(n+1)) / (1 - alpha)^2. It is negative wherever
    acceptance is high: at every alpha >= 0.7 for n = 2, ..., 12 (-5813 at alpha = 0.9, n = 10), and at
    alpha = 0.5, n = 2 (-0.25); it is not 0 at n = 1, where nothing is random.

    Args:
        alpha: the paper's alpha, in [0, 1).
        n: trials, draft length + 1.

    Returns:
        The printed value, kept for comparison only.

    Raises:
        ValueError: if a number is out of range.
    """
    _check_printed(alpha, n)
    factor = n * n - 1
    return alpha * (1.0 - factor * alpha**n - factor * alpha ** (n + 1)) / (1.0 - alpha) ** 2


def _check_printed(alpha: float, n: int) -> None:
    check_probability("alpha", alpha)
    check_positive("1 - alpha", 1.0 - alpha)
    check_at_least("n", n, 1)
