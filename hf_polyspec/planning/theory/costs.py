# SPDX-License-Identifier: Apache-2.0
"""What a token costs in a chain of models.

Sequences run from the target down (``pass_times[0]`` is the target's), like everywhere in the package, except
in the results of the recursion, which say so. Pass times must be measured at the number of rows really run.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from .checks import check_at_least, check_count, check_positive, check_times
from .lengths import expected_length


def lemma_time_per_token(pass_times: Sequence[float], lengths: Sequence[float], beta: float) -> float:
    """Time per token by Lemma 3.1 of the paper, as printed.

    T / N = sum over i < n of T_i / L_i, plus beta T_n / L_(n-1). It holds only if L_i counts the tokens that
    are *finally committed* per pass of model i (see :func:`committed_lengths`). With the tokens model i hands
    up, which is what one measures, it forgets what the models above throw away and predicts too little time:
    use :func:`exact_time_per_token`.

    Args:
        pass_times: T_1, ..., T_n, time of one pass of each model, target first; at least two.
        lengths: L_1, ..., L_(n-1), accepted tokens per pass of each model but the last.
        beta: passes of the last drafter per pass of the model above it (K for a chain of K tokens).

    Returns:
        Time per emitted token, in the unit of ``pass_times``.

    Raises:
        ValueError: if a number is out of range or the sequences do not fit each other.
    """
    if len(pass_times) < 2:
        raise ValueError("Lemma 3.1 needs at least a target and a drafter.")
    check_count("lengths", lengths, len(pass_times) - 1, "model but the last")
    check_times("pass time", pass_times)
    _check_lengths("lengths", lengths)
    check_at_least("beta", beta, 0)
    verifying = math.fsum(time / length for time, length in zip(pass_times, lengths, strict=False))
    return verifying + beta * pass_times[-1] / lengths[-1]


def exact_time_per_token(
    pass_times: Sequence[float], emitted: Sequence[float], handed: Sequence[float], beta: float
) -> float:
    """Time per token with the tokens that upper models throw away accounted for.

    Passes per emitted token: f_1 = 1 / l_1, f_(i+1) = f_i E[B_i] / l_(i+1), f_n = beta f_(n-1); time per
    token is the sum of f_i T_i. For three models T / N = T_1 / L_1 + E[B] / (L_1 l_2) (T_2 + beta T_3), the
    exact form of the paper's Lemma 3.1. It is bookkeeping: it holds for whatever averages a run shows,
    independent tokens or not.

    Args:
        pass_times: time of one pass of each model, target first. One model alone is plain decoding.
        emitted: l_1, ..., l_(n-1), tokens each verifier emits per pass, its own token included.
        handed: E[B_1], ..., E[B_(n-2)], tokens handed per pass to each verifier that sits above another one.
        beta: passes of the drafter per pass of the verifier above it.

    Returns:
        Time per emitted token, in the unit of ``pass_times``.

    Raises:
        ValueError: if a number is out of range or the sequences do not fit each other.
    """
    if not pass_times:
        raise ValueError("A chain needs at least one model.")
    check_times("pass time", pass_times)
    if len(pass_times) == 1:
        check_count("emitted", emitted, 0, "verifier")
        check_count("handed", handed, 0, "verifier above a verifier")
        return pass_times[0]
    return lemma_time_per_token(pass_times, committed_lengths(emitted, handed), beta)


def committed_lengths(emitted: Sequence[float], handed: Sequence[float]) -> tuple[float, ...]:
    """Tokens finally committed per pass of each verifier: the L_i with which Lemma 3.1 is true.

    L_1 = l_1 and L_(i+1) = l_(i+1) L_i / E[B_i]: of the E[B_i] tokens handed to model i per pass only l_i
    come out, so a pass below it counts for less than it emitted.

    Args:
        emitted: l_1, ..., l_(n-1), tokens each verifier emits per pass, target first.
        handed: E[B_1], ..., E[B_(n-2)], tokens handed per pass to each verifier above another one.

    Returns:
        L_1, ..., L_(n-1).

    Raises:
        ValueError: if a number is out of range, the sequences do not fit each other, or a verifier emits more
            than it was handed plus its own token.
    """
    check_count("handed", handed, max(len(emitted) - 1, 0), "verifier above a verifier")
    _check_lengths("emitted", emitted)
    _check_lengths("handed", handed)
    committed = list(emitted[:1])
    for level, block in enumerate(handed):
        if emitted[level] > block + 1 + 1e-9:
            raise ValueError(
                f"Level {level} cannot emit {emitted[level]} tokens a pass from {block} and one of its own."
            )
        committed.append(emitted[level + 1] * committed[level] / block)
    return tuple(committed)


def implied_beta(target_time: float, drafter_time: float, length: float, speed_up: float) -> float:
    """Drafter passes per target pass that Lemma 3.1 needs to explain a measured two-model speed-up.

    Solves T_1 / speed_up = (T_1 + beta T_2) / L_1 for beta.

    Args:
        target_time: T_1, one pass of the target, which is also the time of a plainly decoded token.
        drafter_time: T_2, one pass of the drafter.
        length: L_1, tokens per target pass.
        speed_up: measured, against plain decoding.

    Returns:
        beta. Negative if the speed-up exceeds ``length``, which no drafter can explain.

    Raises:
        ValueError: if a number is not positive.
    """
    for name, value in (("target_time", target_time), ("drafter_time", drafter_time)):
        check_positive(name, value)
    check_positive("length", length)
    check_positive("speed_up", speed_up)
    return target_time * (length / speed_up - 1.0) / drafter_time


def chain_cost(pass_times: Sequence[float], agreements: Sequence[float], blocks: Sequence[int]) -> tuple[float, ...]:
    """Time per emitted token of every level of a chain, bottom up.

    C_0 = t_0 and C_i = (t_i + L_i C_(i-1)) / g(a_i, L_i), g = :func:`~.lengths.expected_length`: to
    emit g tokens, level i pays one pass of its own and L_i tokens of the level below. Blocks are taken to
    be exactly L_i long; :func:`~.rounds.chain_rounds` keeps the overshoot of the last round.

    Args:
        pass_times: time of one pass of each model, target first; the last is the drafter's time per token
            (for a tree or a parallel drafter: the time of a draft divided by the tokens proposed).
        agreements: for each model but the last, the probability that it accepts a token of the model below.
        blocks: for each model but the last, tokens it is offered per pass.

    Returns:
        C_0, ..., C_(n-1), drafter first: the last entry is the time per token of the whole chain.

    Raises:
        ValueError: if a number is out of range or the sequences do not fit each other.
    """
    check_count("agreements", agreements, len(blocks), "block")
    emitted = [expected_length(a, block) for a, block in zip(agreements, blocks, strict=True)]
    return chain_cost_from_lengths(pass_times, blocks, emitted)


def chain_cost_from_lengths(
    pass_times: Sequence[float], blocks: Sequence[float], emitted: Sequence[float]
) -> tuple[float, ...]:
    """The chain recursion with measured lengths in the place of g(a, L).

    C_0 = t_0 and C_i = (t_i + L_i C_(i-1)) / l_i. Measured lengths carry what one agreement per level
    cannot: acceptance that falls with the position, trees, block verification.

    Args:
        pass_times: time of one pass of each model, target first, the last per drafted token.
        blocks: tokens offered per pass, or their mean, for each model but the last.
        emitted: tokens emitted per pass, own token included, for each model but the last.

    Returns:
        C_0, ..., C_(n-1), drafter first.

    Raises:
        ValueError: if a number is out of range or the sequences do not fit each other.
    """
    if not pass_times:
        raise ValueError("A chain needs at least one model.")
    check_times("pass time", pass_times)
    check_count("blocks", blocks, len(pass_times) - 1, "model but the last")
    check_count("emitted", emitted, len(pass_times) - 1, "model but the last")
    check_times("block", blocks)
    _check_lengths("emitted", emitted)
    costs = [pass_times[-1]]
    for level in range(len(pass_times) - 2, -1, -1):
        costs.append((pass_times[level] + blocks[level] * costs[-1]) / emitted[level])
    return tuple(costs)


def _check_lengths(name: str, values: Sequence[float]) -> None:
    for level, value in enumerate(values):
        check_positive(f"{name} of level {level}", value)
