# SPDX-License-Identifier: Apache-2.0
"""Rounds with their overshoot, and the block sizes that cost least.

Sequences run from the target down, results of a chain from the drafter up, as in ``costs``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

from .checks import check_at_least, check_count, check_positive, check_probability, check_times
from .lengths import expected_length, law_mean, length_law


class Round(NamedTuple):
    """One round of a level: the law of what it emits and what it costs, all levels below included.

    Attributes:
        law: entry k - 1 is the probability that the round emits k tokens.
        cost: mean time of the round.
    """

    law: tuple[float, ...]
    cost: float

    @property
    def length(self) -> float:
        """Mean tokens emitted by the round."""
        return law_mean(self.law)

    @property
    def time_per_token(self) -> float:
        """Time per emitted token in the long run: mean cost by mean length, by the renewal theorem."""
        return self.cost / self.length


def drafted_round(pass_time: float, draft_time: float, agreement: float, proposed: int) -> Round:
    """A round of a verifier that sits directly above the drafter.

    Args:
        pass_time: one pass of the verifier over ``proposed + 1`` rows.
        draft_time: the whole draft: ``proposed`` passes of a chain drafter, or all passes of a tree.
        agreement: probability that one proposed token is accepted.
        proposed: tokens in the draft.

    Returns:
        The round, of the law of :func:`~.lengths.length_law`.

    Raises:
        ValueError: if a number is out of range.
    """
    check_positive("pass_time", pass_time)
    check_at_least("draft_time", draft_time, 0)
    return Round(length_law(agreement, proposed), pass_time + draft_time)


def verified_round(pass_time: float, agreement: float, threshold: int, below: Round) -> Round:
    """A round of a verifier that collects rounds of the level below until a threshold, keeping the overshoot.

    The block length B is the first partial sum of the lower rounds' lengths to reach the threshold; given B
    the emitted length has the law of :func:`~.lengths.length_law`. Exact if every token is accepted
    independently with the same probability.

    Args:
        pass_time: one pass of the verifier.
        agreement: probability that it accepts one token of the level below.
        threshold: it stops collecting once it holds at least this many tokens.
        below: a round of the level below.

    Returns:
        The round, the cost of the lower rounds included.

    Raises:
        ValueError: if a number is out of range.
    """
    check_positive("pass_time", pass_time)
    blocks, rounds = block_law(threshold, below.law)
    law = [0.0] * (len(blocks) + 1)
    for block, weight in enumerate(blocks, start=1):
        if weight:
            for index, probability in enumerate(length_law(agreement, block)):
                law[index] += weight * probability
    return Round(tuple(law), pass_time + rounds * below.cost)


def block_law(threshold: int, round_law: Sequence[float]) -> tuple[tuple[float, ...], float]:
    """Law of the block length when rounds are collected until a threshold, and the mean number of rounds.

    Renewal argument: with r(s) the probability that a partial sum is exactly s, the block is b with
    probability sum over s < threshold of r(s) P(N = b - s), and the mean number of rounds is the sum of
    r(s). By Wald's identity the mean block is that number times the mean round.

    Args:
        threshold: tokens to reach, at least 1.
        round_law: entry k - 1 is the probability that a round emits k tokens.

    Returns:
        (law of the block, entry b - 1 for b tokens; mean number of rounds).

    Raises:
        ValueError: if the threshold is smaller than 1 or the law is empty or does not sum to 1.
    """
    check_at_least("threshold", threshold, 1)
    if abs(math.fsum(round_law) - 1.0) > 1e-9:
        raise ValueError(f"round_law must sum to 1, got {math.fsum(round_law)}.")
    blocks = [0.0] * (threshold + len(round_law) - 1)
    reached = [1.0] + [0.0] * (threshold - 1)
    for held in range(threshold):
        for emitted, probability in enumerate(round_law, start=1):
            total = held + emitted
            if total >= threshold:
                blocks[total - 1] += reached[held] * probability
            else:
                reached[total] += reached[held] * probability
    return tuple(blocks), math.fsum(reached)


def chain_rounds(pass_times: Sequence[float], agreements: Sequence[float], blocks: Sequence[int]) -> tuple[Round, ...]:
    """Rounds of every verifier of a chain, bottom up, with the overshoot of the last lower round kept.

    The same question as :func:`~.costs.chain_cost`, answered exactly for independent tokens.

    Args:
        pass_times: time of one pass of each model, target first, the last per drafted token; at least two.
        agreements: for each model but the last, the probability that it accepts a token of the model below.
        blocks: threshold of each verifier, and for the lowest the draft length.

    Returns:
        One round per verifier, lowest first: the last is the target's.

    Raises:
        ValueError: if a number is out of range or the sequences do not fit each other.
    """
    if len(pass_times) < 2:
        raise ValueError("A chain of rounds needs at least a target and a drafter.")
    check_count("agreements", agreements, len(pass_times) - 1, "model but the last")
    check_count("blocks", blocks, len(pass_times) - 1, "model but the last")
    check_times("pass time", pass_times)
    rounds = [drafted_round(pass_times[-2], blocks[-1] * pass_times[-1], agreements[-1], blocks[-1])]
    for level in range(len(pass_times) - 3, -1, -1):
        rounds.append(verified_round(pass_times[level], agreements[level], blocks[level], rounds[-1]))
    return tuple(rounds)


class BestBlock(NamedTuple):
    """The block size that costs least per emitted token.

    Attributes:
        block: tokens to offer per pass; 0 means that the level below does not pay.
        time_per_token: predicted time per emitted token at that size.
    """

    block: int
    time_per_token: float


def best_block(pass_time: float, token_cost: float, agreement: float, largest: int = 64) -> BestBlock:
    """Best number of tokens to offer a verifier whose pass costs the same at every size.

    Minimises (t + B c) / g(a, B) over B = 0, ..., largest, one step of the chain recursion. The optimum is
    flat; too large a block hurts when agreement is below about 0.92.

    Args:
        pass_time: t, one pass of the verifier.
        token_cost: c, time per token of the level below.
        agreement: a, probability that one offered token is accepted.
        largest: largest block tried.

    Returns:
        The block and its time per token; the smallest of equals.

    Raises:
        ValueError: if a number is out of range.
    """
    check_positive("pass_time", pass_time)
    return best_block_measured(lambda rows: pass_time, token_cost, agreement, largest)


def best_block_measured(
    pass_time: Callable[[int], float], token_cost: float, agreement: float, largest: int = 64
) -> BestBlock:
    """Best number of tokens to offer a verifier whose pass time was measured by rows.

    Minimises (t(B + 1) + B c) / g(a, B) over B = 0, ..., largest. Every size is tried, because measured
    times have steps at tile sizes and need not be convex.

    Args:
        pass_time: time of one pass by its number of rows (block + 1).
        token_cost: c, time per token of the level below.
        agreement: a, probability that one offered token is accepted.
        largest: largest block tried.

    Returns:
        The block and its time per token; the smallest of equals.

    Raises:
        ValueError: if a number is out of range.
    """
    check_at_least("token_cost", token_cost, 0)
    check_probability("agreement", agreement)
    check_at_least("largest", largest, 0)
    best = BestBlock(0, math.inf)
    for block in range(largest + 1):
        time = (pass_time(block + 1) + block * token_cost) / expected_length(agreement, block)
        if time < best.time_per_token:
            best = BestBlock(block, time)
    return best


def best_chain_blocks(
    pass_times: Sequence[float], agreements: Sequence[float], largest: int = 64
) -> tuple[BestBlock, ...]:
    """Best block of every verifier of a chain, bottom up.

    C_i grows with C_(i-1), so choosing the best block at each level, the lowest first, minimises the chain
    recursion of :func:`~.costs.chain_cost` over all combinations.

    Args:
        pass_times: time of one pass of each model, target first, the last per drafted token; at least two.
        agreements: for each model but the last, the probability that it accepts a token of the model below.
        largest: largest block tried at each level.

    Returns:
        One entry per verifier, lowest first: the last is the target's, with the time per token of the chain.
        A block of 0 means that nothing below that verifier pays.

    Raises:
        ValueError: if a number is out of range or the sequences do not fit each other.
    """
    if len(pass_times) < 2:
        raise ValueError("A chain with blocks needs at least a target and a drafter.")
    check_count("agreements", agreements, len(pass_times) - 1, "model but the last")
    check_times("pass time", pass_times)
    chosen: list[BestBlock] = []
    cost = pass_times[-1]
    for time, agreement in zip(reversed(pass_times[:-1]), reversed(agreements), strict=True):
        chosen.append(best_block(time, cost, agreement, largest))
        cost = chosen[-1].time_per_token
    return tuple(chosen)
