# SPDX-License-Identifier: Apache-2.0
"""The online control on a clock of the test: what it switches off, when it tries again, which sizes it finds."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import pytest
from clockwork import Clock, ClockedDrafter, ClockedRunner, Run, truth

from hf_polyspec.control import forget
from hf_polyspec.control.budget import FIRST_INTERVAL
from hf_polyspec.control.setups import DRAFTS
from hf_polyspec.levels.base import Drafter
from hf_polyspec.levels.verifier import Verifier
from hf_polyspec.planning.theory.cost_model import Acceptance, Member, SecondsTable, predict


@pytest.fixture(autouse=True)
def nothing_learnt() -> Iterator[None]:
    forget()
    yield
    forget()


def affine(one: float, more: float) -> Callable[[int], float]:
    """Seconds of a pass: `one` for the first token and `more` for every other."""
    return lambda tokens: one + more * (tokens - 1)


TARGET = affine(1.0, 0.05)


def target_over(clock: Clock, below: Drafter) -> Verifier:
    return Verifier(ClockedRunner(clock, TARGET, lambda: 1.0, 1000), below, name="target")


def middle_over(clock: Clock, below: Drafter, seconds: Callable[[int], float], agreement: float, size: int) -> Verifier:
    return Verifier(ClockedRunner(clock, seconds, lambda: agreement, size), below, name="middle")


def plain_seconds(tokens: int, prompt: int, rows: int = 1) -> float:
    return TARGET(rows * prompt) + (tokens - 1) * TARGET(rows)


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("step", [0.02, 0.15, 0.4])
@pytest.mark.parametrize("tokens", [32, 128])
def test_a_drafter_that_is_always_wrong_costs_less_than_five_percent(tokens: int, step: float, rows: int) -> None:
    clock = Clock()
    run = Run(clock, target_over(clock, ClockedDrafter(clock, lambda: step, lambda: 0.0)), tokens, rows=rows)
    assert run.seconds <= 1.05 * plain_seconds(tokens, 20, rows)
    assert run.text == [[truth(20 + i) for i in range(tokens)]] * rows
    assert run.log[-1][2] == (0,)


@pytest.mark.parametrize("size", [300, 1000], ids=["looks cheap", "as large as the target"])
@pytest.mark.parametrize("agreement", [0.0, 1.0])
@pytest.mark.parametrize("tokens", [128, 300])
def test_a_middle_slower_than_the_target_costs_less_than_five_percent(tokens: int, agreement: float, size: int) -> None:
    clock = Clock()
    drafter = ClockedDrafter(clock, lambda: 0.15, lambda: 0.0)
    middle = middle_over(clock, drafter, affine(1.4, 0.05), agreement, size)
    run = Run(clock, target_over(clock, middle), tokens)
    assert run.seconds <= 1.05 * plain_seconds(tokens, 20)


def test_a_bad_level_is_tried_again_at_growing_intervals() -> None:
    clock = Clock()
    drafter = ClockedDrafter(clock, lambda: 0.05, lambda: 0.0)
    run = Run(clock, target_over(clock, drafter), 600)
    trials = [decision.token for decision in run.control.decisions if decision.reason.startswith("trial")]
    assert len(trials) >= 3
    waits = [after - before for before, after in itertools.pairwise(trials)]
    assert all(wait >= FIRST_INTERVAL * 2**i for i, wait in enumerate(waits))
    stats = drafter.stats
    assert stats.switched_on >= 3
    assert stats.switched_off == stats.switched_on
    assert [size == 0 for _, size in stats.sizes[:3]] == [True, False, True]


def test_a_level_that_becomes_good_is_switched_on_and_one_that_becomes_bad_off() -> None:
    clock, good = Clock(), [0.0]
    top = target_over(clock, ClockedDrafter(clock, lambda: 0.05, lambda: good[0]))

    def change(emitted: int) -> None:
        good[0] = 0.9 if 300 <= emitted < 900 else 0.0

    run = Run(clock, top, 1400, during=change)
    emitted, used = 0, {"bad": [0, 0], "good": [0, 0], "bad again": [0, 0]}
    for _, tokens, levels in run.log:
        phase = "bad" if emitted < 300 else "good" if emitted < 900 else "bad again"
        # The middle of each phase: finding out takes its time.
        if emitted % 900 > 250 or emitted > 1000:
            used[phase][levels == (0, 1)] += tokens
        emitted += tokens
    assert used["good"][1] > 0.6 * sum(used["good"])
    assert used["bad"][1] < 0.1 * sum(used["bad"])
    assert used["bad again"][1] < 0.1 * sum(used["bad again"])


@pytest.mark.parametrize("agreement", [0.5, 0.8, 0.93])
def test_the_draft_length_comes_to_be_the_best(agreement: float) -> None:
    """Within 4 % of the speed of the analytically best length, for the second half of a long text."""
    clock = Clock()
    run = Run(clock, target_over(clock, ClockedDrafter(clock, lambda: 0.1, lambda: agreement)), 700)
    table = SecondsTable(((1, 1.0), (2, 1.05)))
    drafter = Member("", SecondsTable.per_token(0.1), Acceptance.constant(agreement))
    speeds = {k: predict([Member("", table), drafter], [k]).tokens_per_second for k in DRAFTS}
    lengths = [size for token, size in run.control.chain.levels[1].stats.sizes if token > 350 and size]
    assert lengths or run.control.setup.sizes
    for size in lengths or run.control.setup.sizes:
        assert speeds[size] > 0.94 * max(speeds.values())
    half = len(run.log) // 2
    seconds = sum(took for took, _, _ in run.log[half:])
    emitted = sum(tokens for _, tokens, _ in run.log[half:])
    assert emitted / seconds > 0.90 * max(speeds.values())


def test_a_good_chain_of_three_is_found_and_a_slow_middle_is_left_out() -> None:
    speeds = {}
    for seconds in (0.2, 1.4):
        forget()
        clock = Clock()
        drafter = ClockedDrafter(clock, lambda: 0.02, lambda: 0.6)
        middle = middle_over(clock, drafter, affine(seconds, 0.01), 0.97, 300)
        run = Run(clock, target_over(clock, middle), 400)
        speeds[seconds] = run.control.setup.levels
        assert run.seconds < 0.6 * plain_seconds(400, 20)
    assert speeds[0.2] == (0, 1, 2)
    assert speeds[1.4] == (0, 2)


def test_a_middle_catches_up_on_what_it_missed_in_one_pass() -> None:
    clock, good = Clock(), [0.0]
    runner = ClockedRunner(clock, affine(0.2, 0.01), lambda: good[0], 300)
    middle = Verifier(runner, ClockedDrafter(clock, lambda: 0.02, lambda: 0.6), name="middle")

    def change(emitted: int) -> None:
        if emitted >= 150 and not good[0]:
            good[0] = 0.97
            runner.right.clear()

    Run(clock, target_over(clock, middle), 500, during=change)
    pauses = [fed for fed in runner.fed if fed > 30]
    assert pauses
    # Between two reads of much there are small ones only: what was missed came in one piece.
    assert sum(runner.fed) < 4 * 500


def test_the_first_generation_teaches_the_second() -> None:
    clock = Clock()
    drafter = ClockedDrafter(clock, lambda: 0.02, lambda: 0.9)
    top = target_over(clock, drafter)
    first, second = (Run(clock, top, 64) for _ in range(2))
    assert first.control.decisions[0].levels == (0,)
    assert second.control.decisions[0].levels == (0, 1)
    assert second.seconds < first.seconds


def test_losses_stay_within_the_budget_over_many_short_generations() -> None:
    clock = Clock()
    top = target_over(clock, ClockedDrafter(clock, lambda: 0.3, lambda: 0.0))
    seconds = sum(Run(clock, top, 24).seconds for _ in range(12))
    assert seconds <= 1.05 * 12 * plain_seconds(24, 20)
