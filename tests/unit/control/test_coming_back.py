# SPDX-License-Identifier: Apache-2.0
"""What a setup that rests waits for before it is asked again: nothing, where asking costs nothing."""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
from clockwork import VOCABULARY, Clock, ClockedDrafter, ClockedRunner, Run, truth

from hf_polyspec.control import Costs, SteadyControl
from hf_polyspec.control.ledger import OF_ROOM, START, TRUSTED
from hf_polyspec.control.pace import DOUBTED, RESTED, SETTLED, Pace
from hf_polyspec.exactness.context import Context, Prompt
from hf_polyspec.exactness.distributions import LawMaker
from hf_polyspec.exactness.proposal import Proposal
from hf_polyspec.levels.verifier import Verifier

COLUMNS = (1, 2, 4, 8, 16, 32)


def table(one: float, column: float = 0.05) -> list[list[float]]:
    return [[k, one * (1 + column * (k - 1))] for k in COLUMNS]


class Copier(ClockedDrafter):
    """Finds one token until a copy begins, and is wrong; then long drafts, all right. It knows how likely each is."""

    tells_chances = True
    begun = False

    def propose(self, context: Context, limits: list[int], law: LawMaker) -> Proposal:
        count = min(limits[0], 20 if self.begun else 1)
        at = len(context.ids[0])
        tokens = [truth(at + i) if self.begun else VOCABULARY - 2 for i in range(count)]
        chances = [(0.99 if self.begun else 0.3) ** (i + 1) for i in range(count)]
        return Proposal([tokens], None, [[self.index] * count], lambda: [chances])


def copied(steps: int) -> tuple[Run, float]:
    """A text of which the last 120 tokens are a copy, under a target alone; seconds of the copy."""
    clock = Clock()
    drafter = Copier(clock, lambda: 0.0, lambda: 0.0)
    top = Verifier(ClockedRunner(clock, lambda k: 1 + 0.05 * (k - 1), lambda: 1.0, 4), drafter, name="target")
    moments: dict[bool, float] = {}

    def during(emitted: int) -> None:
        drafter.begun = emitted >= steps
        moments.setdefault(drafter.begun, clock.now)

    costs = Costs([table(1.0)], 0.0)
    found = Run(clock, top, steps + 120, during=during, control=partial(SteadyControl, costs=costs))
    assert found.text == [[truth(20 + i) for i in range(steps + 120)]]
    lost = moments[True] / steps - 1
    assert lost <= (0.045 if steps < 64 else 0.03)
    return found, clock.now - moments[True]


@pytest.mark.parametrize("steps", [40, 64, 150, 333])
def test_a_copy_is_drafted_from_its_first_round_whatever_was_wrong_before(steps: int) -> None:
    """What tells its chances is asked in every round that may lose a token's column."""
    _, seconds = copied(steps)
    assert seconds <= (120 / 21 + 1) * (1 + 0.05 * 20) + 1


def rounds_of(stage: Any, tokens: int) -> list[tuple[int, ...]]:
    stage.top.runner.memo, stage.top.below.runner.memo = [], []
    found = Run(stage.clock, stage.top, tokens, prompt=1, control=partial(SteadyControl, costs=stage.costs))
    return [decision.sizes for decision in found.control.decisions]


class Pair:
    """A target over a middle that takes half its time and is always right, under which nothing drafts."""

    def __init__(self, middle: float = 1.0) -> None:
        self.clock = Clock()
        self.costs = Costs([table(1.0, 0.03), table(0.4, 0.03)], 0.95)
        self.below = Verifier(
            ClockedRunner(self.clock, lambda k: 0.4 * (1 + 0.03 * (k - 1)), lambda: middle, 3),
            ClockedDrafter(self.clock, lambda: 0.0, lambda: 0.0),
            name="middle",
        )
        self.top = Verifier(
            ClockedRunner(self.clock, lambda k: 1 + 0.03 * (k - 1), lambda: 1.0, 4), self.below, name="target"
        )


def test_what_was_right_in_the_answers_before_may_lose_more_at_the_start_of_a_long_one() -> None:
    assert OF_ROOM * 16 < START < OF_ROOM * 64 < TRUSTED
    pair = Pair()
    unknown = rounds_of(pair, 64)[0]
    assert pair.costs.middle.proven
    long, short = rounds_of(pair, 64)[0], rounds_of(pair, 16)[0]
    assert unknown[0] == short[0] == 1
    assert long[0] >= 2


@pytest.mark.parametrize("tokens", [16, 64, 128])
def test_and_when_it_is_wrong_the_answer_pays_no_more_than_it_may(tokens: int) -> None:
    pair = Pair()
    rounds_of(pair, 128)
    pair.below.runner.agreement = lambda: 0.0  # type: ignore[attr-defined]
    pair.below.runner.right.clear()  # type: ignore[attr-defined]
    began = pair.clock.now
    rounds_of(pair, tokens)
    assert (pair.clock.now - began) / tokens - 1 <= (0.05 if tokens == 16 else 0.03)


def test_the_first_pass_of_a_size_says_nothing_of_a_level_below() -> None:
    """It is compiled, or its memory is laid out; a level that seems dear is not asked, and would stay so."""
    pace = Pace([lambda columns: 10.0, lambda columns: 4.0])
    for _ in range(12):
        pace.observe(0, 1, 10.0, offered=0)
    for columns in (1, 3):
        pace.observe(1, columns, 400.0, offered=columns - 1)
    assert pace.seconds(1, 1) == pytest.approx(4.0)
    pace.observe(1, 1, 7.0, offered=0)
    assert pace.seconds(1, 1) == pytest.approx(7.0, rel=0.05)


def test_a_few_slow_passes_do_not_shut_a_level_out_for_good() -> None:
    """Another one of its kernels was compiled; whether it is quick is only seen where it is asked."""
    pace = Pace([lambda columns: 10.0, lambda columns: 4.0])
    for _ in range(12):
        pace.observe(0, 1, 10.0, offered=0)
    for _ in range(3):
        pace.observe(1, 1, 60.0, offered=0)
    assert 7 < pace.seconds(1, 1) <= DOUBTED * 4.0
    for _ in range(RESTED + 1):
        pace.observe(0, 1, 10.0, offered=0)
    assert pace.seconds(1, 1) == pytest.approx(4.0)


def test_what_a_level_has_cost_in_many_passes_is_remembered_while_it_rests() -> None:
    pace = Pace([lambda columns: 10.0, lambda columns: 4.0])
    for _ in range(2):
        pace.observe(0, 1, 10.0, offered=0)
    for _ in range(SETTLED + 4):
        pace.observe(1, 1, 7.0, offered=0)
    for _ in range(3 * RESTED):
        pace.observe(0, 1, 10.0, offered=0)
    assert pace.seconds(1, 1) == pytest.approx(7.0, rel=0.1)


def test_what_a_busy_moment_made_of_a_level_is_not() -> None:
    """Between two passes of the target nobody says that it is the machine which is slow."""
    pace = Pace([lambda columns: 10.0, lambda columns: 4.0])
    pace.observe(0, 1, 10.0, offered=0)
    pace.observe(0, 1, 10.0, offered=0)
    for seconds in [4.0] * (SETTLED + 1) + [60.0] * 40:
        pace.observe(1, 1, seconds, offered=0)
    for _ in range(4):
        pace.observe(0, 1, 10.0, offered=0)
    assert pace.seconds(1, 1) > 10
    for _ in range(RESTED + 1):
        pace.observe(0, 1, 10.0, offered=0)
    assert pace.seconds(1, 1) == pytest.approx(4.0, rel=0.05)


class Compiled:
    """The seconds of a pass, which takes far longer the first time that a size comes."""

    def __init__(self, seconds: Callable[[int], float]) -> None:
        self.seconds, self.met = seconds, set[int]()

    def __call__(self, columns: int) -> float:
        first = columns not in self.met
        self.met.add(columns)
        return (50.0 if first else 1.0) * self.seconds(columns)


@pytest.mark.parametrize("everywhere", [False, True])
def test_kernels_that_are_compiled_on_the_way_shut_nobody_out(everywhere: bool) -> None:
    """A good middle runs from the first answer on, though the first pass of each size took fifty times the others'."""
    pair = Pair()
    for level in (pair.top, pair.below) if everywhere else (pair.below,):
        level.runner.seconds = Compiled(level.runner.seconds)  # type: ignore[attr-defined]
    rounds_of(pair, 64)
    passes = len(pair.top.runner.fed)  # type: ignore[attr-defined]
    assert passes < 0.4 * 64
    assert pair.costs.standing.place == 0


def test_a_slow_first_pass_of_the_target_makes_nobody_slow() -> None:
    """A middle that has not run is believed to take its table at the pace of the machine, not of one pass."""
    pace = Pace([lambda columns: 10.0, lambda columns: 4.0])
    pace.observe(0, 1, 90.0, offered=0)
    for _ in range(3):
        pace.observe(0, 2, 10.0, offered=1)
    assert pace.seconds(1, 1) == pytest.approx(4.0, rel=0.05)


def test_what_a_first_pass_takes_besides_is_told() -> None:
    pace = Pace([lambda columns: 10.0, lambda columns: 4.0])
    assert pace.observe(0, 1, 20.0, offered=0) == 0.0, "the machine may be as slow"
    assert pace.observe(1, 1, 90.0, offered=0) == pytest.approx(90 - 8)
    assert pace.observe(0, 3, 25.0, offered=2) == pytest.approx(25 - 20)
    assert pace.observe(0, 3, 95.0, offered=2) == 0.0


def test_the_machines_pace_and_what_the_target_takes_do_not_drift_apart() -> None:
    pace = Pace([lambda columns: 10.0, lambda columns: 4.0])
    dice = random.Random(3)
    for _ in range(2000):  # slow and quick in turns: each leaves its trace in both
        for seconds in (10.0, 10.0, 35.0 * dice.random() + 8):
            pace.observe(0, 1, seconds, offered=0)
    for _ in range(80):
        pace.observe(0, 1, 10.0, offered=0)
    assert pace.seconds(0, 1) == pytest.approx(10.0, rel=0.05)
    assert pace.seconds(1, 1) == pytest.approx(4.0, rel=0.05)


def test_an_answer_that_is_far_behind_goes_on_with_the_target_alone() -> None:
    """Though the setup that runs has lost nothing: what an answer may lose is counted over all of them."""
    clock = Clock()
    drafter = Copier(clock, lambda: 0.0, lambda: 0.0)
    drafter.begun = True
    top = Verifier(ClockedRunner(clock, lambda k: 1 + 0.05 * (k - 1), lambda: 1.0, 4), drafter, name="target")
    found = Run(clock, top, 256, control=partial(SteadyControl, costs=Costs([table(1.0)], 0.0)))
    control, context = found.control, Context([list(range(4))], Prompt(4, None, None))
    for won, levels in ((control.ledger.won, (0, 1)), (-10.0, (0,))):
        control.ledger.won = won
        control.before(context, [64])
        assert control.setup.levels == levels
