# SPDX-License-Identifier: Apache-2.0
"""Cost of a token: exact forms against a simulated chain, the printed lemma shown to miss the waste."""

from __future__ import annotations

import itertools
import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_polyspec.planning import theory

# The same examples in every run, however busy the machine is.
REPEATABLE = settings(deadline=None, derandomize=True, max_examples=60)

TIMES = st.floats(0.01, 100.0)
AGREEMENTS = st.floats(0.0, 1.0)


def accepted_and_own(coins: random.Random, agreement: float, proposed: int) -> int:
    taken = 0
    while taken < proposed and coins.random() < agreement:
        taken += 1
    return taken + 1


class Simulated:
    """A run of target, middle and drafter with independent tokens, counted pass by pass."""

    def __init__(
        self, times: tuple[float, float, float], agreements: tuple[float, float], blocks: tuple[int, int]
    ) -> None:
        coins, self.targets = random.Random(0), 30_000
        self.middles = self.drafts = self.handed = self.given = self.emitted = 0
        costs, lengths = [], []
        for _ in range(self.targets):
            block = rounds = 0
            while block < blocks[0]:
                block += accepted_and_own(coins, agreements[1], blocks[1])
                rounds += 1
            lengths.append(accepted_and_own(coins, agreements[0], block))
            costs.append(times[0] + rounds * (times[1] + blocks[1] * times[2]))
            self.middles += rounds
            self.handed += block
        self.emitted = sum(lengths)
        self.time_per_token = sum(costs) / self.emitted
        # Standard error of a ratio of means.
        spread = math.fsum(
            (cost - self.time_per_token * length) ** 2 for cost, length in zip(costs, lengths, strict=True)
        )
        self.error = math.sqrt(spread) / self.emitted


SETTINGS = [
    ((22.0, 7.0, 1.0), (0.85, 0.75), (10, 5)),
    ((22.0, 7.0, 1.0), (0.98, 0.75), (10, 5)),
    ((1.0, 0.3, 0.05), (0.95, 0.72), (11, 3)),
    ((1.0, 0.2, 0.02), (0.6, 0.9), (1, 8)),
]


@pytest.mark.parametrize(("times", "agreements", "blocks"), SETTINGS)
def test_rounds_equal_simulation(
    times: tuple[float, float, float], agreements: tuple[float, float], blocks: tuple[int, int]
) -> None:
    # Seed 0, 30000 target passes, two-sided at 5 standard errors: false alarm below 6e-7 a setting.
    run = Simulated(times, agreements, blocks)
    target = theory.chain_rounds(times, agreements, blocks)[-1]
    assert abs(run.time_per_token - target.time_per_token) < 5 * run.error

    emitted = (run.emitted / run.targets, run.handed / run.middles)
    handed = (run.handed / run.targets,)
    exact = theory.exact_time_per_token(times, emitted, handed, blocks[1])
    assert exact == pytest.approx(run.time_per_token, rel=1e-12), "with measured averages it is bookkeeping"

    printed = theory.lemma_time_per_token(times, emitted, blocks[1])
    assert printed < run.time_per_token - 5 * run.error, "the printed lemma forgets the waste"
    committed = theory.committed_lengths(emitted, handed)
    assert committed[1] == pytest.approx(run.emitted / run.middles)
    assert theory.lemma_time_per_token(times, committed, blocks[1]) == pytest.approx(exact, rel=1e-12)


def test_lemma_misses_a_third_where_the_target_often_disagrees() -> None:
    times, blocks = (22.0, 7.0, 1.0), (10, 5)
    for agreement, true, raw in ((0.85, 11.17, 7.45), (0.98, 5.73, 5.60)):
        middle, target = theory.chain_rounds(times, (agreement, 0.75), blocks)
        assert target.time_per_token == pytest.approx(true, abs=0.005)
        lemma = theory.lemma_time_per_token(times, (target.length, middle.length), 5)
        assert lemma == pytest.approx(raw, abs=0.005)


@pytest.mark.parametrize(
    ("times", "agreements", "blocks", "simulated"),
    [
        ((1.0, 0.05), (0.70,), (5,), 2.353),
        ((1.0, 0.3, 0.05), (0.95, 0.72), (11, 3), 3.175),
    ],
)
def test_recursion_predicts_simulated_speed_ups(
    times: tuple[float, ...], agreements: tuple[float, ...], blocks: tuple[int, ...], simulated: float
) -> None:
    assert 1 / theory.chain_cost(times, agreements, blocks)[-1] == pytest.approx(simulated, rel=0.005)
    assert 1 / theory.chain_rounds(times, agreements, blocks)[-1].time_per_token == pytest.approx(simulated, rel=0.005)


def test_recursion_by_hand() -> None:
    costs = theory.chain_cost((10.0, 2.0, 0.5), (0.5, 0.0), (2, 1))
    assert costs == pytest.approx((0.5, 2.5, (10 + 2 * 2.5) / 1.75))
    assert theory.chain_cost((3.0,), (), ()) == (3.0,)
    assert theory.exact_time_per_token((3.0,), (), (), 0.0) == 3.0


@REPEATABLE
@given(TIMES, st.floats(0.001, 10.0), AGREEMENTS, st.integers(1, 20))
def test_two_levels_agree_in_every_form(t: float, d: float, agreement: float, proposed: int) -> None:
    cost = theory.chain_cost((t, d), (agreement,), (proposed,))[-1]
    length = theory.expected_length(agreement, proposed)
    lone = theory.chain_rounds((t, d), (agreement,), (proposed,))
    assert len(lone) == 1
    assert lone[0].time_per_token == pytest.approx(cost, rel=1e-9)
    assert theory.lemma_time_per_token((t, d), (length,), proposed) == pytest.approx(cost, rel=1e-9)
    assert theory.exact_time_per_token((t, d), (length,), (), proposed) == pytest.approx(cost, rel=1e-9)
    assert theory.chain_cost_from_lengths((t, d), (proposed,), (length,))[-1] == pytest.approx(cost)


@REPEATABLE
@given(
    st.lists(st.tuples(TIMES, st.floats(0.05, 1.0), st.integers(1, 8)), min_size=1, max_size=3),
    st.floats(0.001, 1.0),
)
def test_exact_form_is_the_recursion_at_any_depth(levels: list[tuple[float, float, int]], draft_time: float) -> None:
    times = (*(level[0] for level in levels), draft_time)
    rounds = theory.chain_rounds(times, [level[1] for level in levels], [level[2] for level in levels])
    emitted = [r.length for r in reversed(rounds)]
    thresholds = [level[2] for level in levels[:-1]]
    below = list(reversed(rounds))[1:]
    handed = [
        theory.law_mean(theory.block_law(threshold, r.law)[0]) for threshold, r in zip(thresholds, below, strict=True)
    ]
    exact = theory.exact_time_per_token(times, emitted, handed, levels[-1][2])
    assert exact == pytest.approx(rounds[-1].time_per_token, rel=1e-9)
    blocks = [*handed, levels[-1][2]]
    by_lengths = theory.chain_cost_from_lengths(times, blocks, emitted)
    assert by_lengths[-1] == pytest.approx(exact, rel=1e-9)


@REPEATABLE
@given(st.floats(0.0, 0.99), st.integers(0, 8), st.integers(1, 20))
def test_block_law_obeys_wald(agreement: float, proposed: int, threshold: int) -> None:
    law = theory.length_law(agreement, proposed)
    blocks, rounds = theory.block_law(threshold, law)
    assert math.fsum(blocks) == pytest.approx(1.0, abs=1e-9)
    assert all(blocks[b - 1] == 0.0 for b in range(1, threshold))
    assert theory.law_mean(blocks) == pytest.approx(rounds * theory.law_mean(law), rel=1e-9)


def test_verified_round_over_threshold_one_passes_rounds_through() -> None:
    below = theory.drafted_round(2.0, 1.0, 0.6, 3)
    above = theory.verified_round(5.0, 1.0, 1, below)
    assert above.cost == 8.0
    assert above.law == pytest.approx((0.0, *below.law)), "everything accepted, and one token more"


def test_free_copy_of_the_target_makes_the_middle_pointless() -> None:
    dual = theory.chain_cost((10.0, 1.0), (0.8,), (4,))[-1]
    chain = theory.chain_cost((10.0, 10.0, 1.0), (1.0, 0.8), (8, 4))[-1]
    assert chain > dual


@pytest.mark.parametrize(
    ("cost", "agreement", "block", "speed_up"),
    [
        (12.0, 0.90, 9, 3.2),
        (12.0, 0.95, 14, 4.1),
        (12.0, 0.98, 24, 5.2),
        (21.6, 0.95, 10, 2.8),
        (21.6, 0.98, 17, 3.3),
    ],
)
def test_best_block_for_the_papers_times(cost: float, agreement: float, block: int, speed_up: float) -> None:
    best = theory.best_block(22.0, cost / 4.67, agreement)
    assert best.block == block
    assert 22.0 / best.time_per_token == pytest.approx(speed_up, abs=0.05)


@REPEATABLE
@given(TIMES, TIMES, AGREEMENTS, st.integers(0, 30))
def test_best_block_is_the_best_and_never_loses_to_plain(t: float, c: float, agreement: float, other: int) -> None:
    best = theory.best_block(t, c, agreement, largest=30)
    there = (t + other * c) / theory.expected_length(agreement, other)
    assert best.time_per_token <= there
    assert best.time_per_token <= t


@REPEATABLE
@given(st.lists(st.tuples(st.floats(0.1, 10.0), AGREEMENTS), min_size=1, max_size=3), st.floats(0.01, 5.0))
def test_best_blocks_of_a_chain_are_the_best_of_all_combinations(
    levels: list[tuple[float, float]], draft_time: float
) -> None:
    times = (*(time for time, _ in levels), draft_time)
    agreements = [agreement for _, agreement in levels]
    chosen = theory.best_chain_blocks(times, agreements, largest=4)
    assert len(chosen) == len(levels)
    combinations = itertools.product(range(5), repeat=len(levels))
    best = min(theory.chain_cost(times, agreements, blocks)[-1] for blocks in combinations)
    assert chosen[-1].time_per_token == pytest.approx(best, rel=1e-12)
    blocks = [level.block for level in reversed(chosen)]
    assert theory.chain_cost(times, agreements, blocks)[-1] == pytest.approx(best, rel=1e-12)


def test_best_block_follows_a_step_in_the_measured_time() -> None:
    flat = theory.best_block(10.0, 0.1, 0.95)
    stepped = theory.best_block_measured(lambda rows: 10.0 if rows <= 8 else 30.0, 0.1, 0.95)
    assert flat.block > 8
    assert stepped.block == 7


def test_useless_level_below_gets_block_zero() -> None:
    assert theory.best_block(5.0, 4.0, 0.1) == (0, 5.0)


def test_implied_beta_returns_the_speed_up() -> None:
    beta = theory.implied_beta(22.0, 4.0, 4.34, 2.61)
    assert beta == pytest.approx(3.65, abs=0.005)
    assert 22.0 / theory.lemma_time_per_token((22.0, 4.0), (4.34,), beta) == pytest.approx(2.61)
    assert theory.implied_beta(22.0, 4.0, 2.0, 2.5) < 0


@pytest.mark.parametrize(
    "call",
    [
        lambda: theory.lemma_time_per_token((1.0,), (), 1.0),
        lambda: theory.lemma_time_per_token((1.0, 1.0), (0.0,), 1.0),
        lambda: theory.lemma_time_per_token((1.0, 1.0), (2.0,), -1.0),
        lambda: theory.exact_time_per_token((), (), (), 1.0),
        lambda: theory.exact_time_per_token((1.0, 1.0, 1.0), (4.5, 2.0), (3.0,), 1.0),
        lambda: theory.exact_time_per_token((1.0,), (2.0,), (), 1.0),
        lambda: theory.committed_lengths((4.0, 2.0), ()),
        lambda: theory.chain_cost((1.0, 1.0), (0.5,), (2, 3)),
        lambda: theory.chain_cost((1.0, -1.0), (0.5,), (2,)),
        lambda: theory.chain_cost_from_lengths((), (), ()),
        lambda: theory.chain_rounds((1.0,), (), ()),
        lambda: theory.block_law(0, (1.0,)),
        lambda: theory.block_law(2, (0.5,)),
        lambda: theory.best_block(0.0, 1.0, 0.5),
        lambda: theory.best_block(1.0, 1.0, 1.5),
        lambda: theory.best_chain_blocks((1.0,), ()),
        lambda: theory.best_chain_blocks((1.0, 1.0), (0.5, 0.5)),
        lambda: theory.implied_beta(1.0, 0.0, 2.0, 2.0),
    ],
)
def test_numbers_that_do_not_fit_are_refused(call: object) -> None:
    assert callable(call)
    with pytest.raises(ValueError, match=r"^.{20,}\.$"):
        call()
