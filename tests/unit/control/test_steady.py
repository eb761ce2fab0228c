# SPDX-License-Identifier: Apache-2.0
"""The control of a measured chain on a clock: what it may lose, and that it comes back when the text changes."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
from clockwork import Clock, ClockedDrafter, ClockedRunner, Run, truth

from hf_polyspec.control import Costs, SteadyControl
from hf_polyspec.exactness.context import Context
from hf_polyspec.exactness.distributions import LawMaker
from hf_polyspec.exactness.proposal import Proposal
from hf_polyspec.levels.verifier import Verifier

TARGET, MIDDLE = 1.0, 0.3
COLUMNS = (1, 2, 4, 8, 16, 32)


def seconds(one: float, columns: float) -> float:
    return one * (1 + 0.03 * (columns - 1))


def table(one: float) -> list[list[float]]:
    return [[k, seconds(one, k)] for k in COLUMNS]


class Stage:
    """A target over a middle over a drafter, each as right as the test says at any moment."""

    def __init__(
        self, middle: float = 0.95, leaf: float = 0.0, believed: float = 0.95, pace: float = 1.0, seed: int = 3
    ) -> None:
        self.clock = Clock()
        self.right = {"middle": middle, "leaf": leaf}
        self.costs = Costs([table(TARGET), table(MIDDLE)], believed)
        drafter = ClockedDrafter(self.clock, lambda: 0.0, lambda: self.right["leaf"])
        below = Verifier(
            ClockedRunner(self.clock, lambda k: pace * seconds(MIDDLE, k), lambda: self.right["middle"], 3),
            drafter,
            name="middle",
        )
        runner = ClockedRunner(self.clock, lambda k: pace * seconds(TARGET, k), lambda: 1.0, 4)
        below.runner.dice = random.Random(seed)  # type: ignore[attr-defined]
        self.top = Verifier(runner, below, name="target")

    def turn(self, middle: float) -> None:
        """From now on the middle is as right as that, at places of which it was asked before, too."""
        self.right["middle"] = middle
        self.top.below.runner.right.clear()  # type: ignore[attr-defined]

    def run(self, tokens: int, during: Callable[[int], None] = lambda emitted: None, prompt: int = 1) -> Run:
        control: Any = partial(SteadyControl, costs=self.costs)
        self.top.runner.memo, self.top.below.runner.memo = [], []  # type: ignore[attr-defined]
        found = Run(
            self.clock,
            self.top,
            tokens,
            prompt=prompt,
            during=during,
            control=lambda top, clock: control(top, clock=clock),
        )
        assert self.top.observer is self.top.below.observer is None  # type: ignore[attr-defined]
        assert found.text == [[truth(prompt + i) for i in range(tokens)]]
        return found


@pytest.mark.parametrize("believed", [0.05, 0.5, 0.95])
@pytest.mark.parametrize("tokens", [16, 64, 128, 256])
def test_what_is_always_wrong_costs_little(tokens: int, believed: float) -> None:
    """A middle and a drafter that are always wrong, whatever the profile says of them."""
    lost = Stage(middle=0.0, leaf=0.0, believed=believed).run(tokens).seconds / (tokens * TARGET) - 1
    assert lost <= (0.05 if tokens == 16 else 0.03)


@pytest.mark.parametrize("tokens", [16, 64, 128])
def test_an_answer_pays_for_its_own_trials(tokens: int) -> None:
    """What was won in the answer before is not for losing in this one."""
    stage = Stage(middle=0.95)
    assert stage.run(128).seconds < 0.75 * 128 * TARGET
    stage.turn(0.0)
    lost = stage.run(tokens).seconds / (tokens * TARGET) - 1
    assert lost <= (0.05 if tokens == 16 else 0.03)


def test_natures_of_a_text_that_change() -> None:
    """Parts of 96 to 224 tokens in which a middle is right and is not, in turns."""
    of_parts: list[list[float]] = [[], []]
    for seed in range(6):
        stage, dice = Stage(seed=seed), random.Random(seed)
        ends = list(itertools.accumulate(dice.randint(96, 224) for _ in range(6)))
        moments = {0: 0.0}

        def changing(emitted: int, stage: Stage = stage, ends: list[int] = ends, moments: Any = moments) -> None:
            part = sum(end <= emitted for end in ends)
            moments.setdefault(part, stage.clock.now)
            stage.right["middle"] = 0.0 if part % 2 else 0.95

        stage.run(ends[-1], changing)
        moments[len(ends)] = stage.clock.now
        for part, (begin, end) in enumerate(itertools.pairwise([0, *ends])):
            of_parts[part % 2].append((moments[part + 1] - moments[part]) / (end - begin))
    good, bad = (sum(seconds) / len(seconds) for seconds in of_parts)
    assert good < 0.7
    assert bad < 1.08


class Silent(ClockedDrafter):
    """Finds nothing."""

    tells_chances = True

    def propose(self, context: Context, limits: list[int], law: LawMaker) -> Proposal:
        return Proposal([[]], None, [[]], lambda: [[]])


def test_reading_a_short_prompt_is_no_loss() -> None:
    """Drafts that are cut by their chances may be longer than a prompt."""
    stage = Stage(middle=1.0)
    stage.top.below.source = stage.top.below.below = Silent(stage.clock, lambda: 0.0, lambda: 0.0)  # type: ignore[attr-defined]
    found = stage.run(64, prompt=30)
    assert {levels for *_, levels in found.log} == {(0, 1, 2)}


def test_a_middle_that_turned_bad_is_left_within_a_few_rounds() -> None:
    stage = Stage(middle=0.95)
    before = stage.run(128)
    assert {levels for *_, levels in before.log} == {(0, 1, 2)}
    assert before.seconds < 0.75 * 128 * TARGET
    stage.turn(0.0)
    after = stage.run(256)
    assert after.control.setup.levels in [(0,), (0, 2)]
    assert after.seconds <= 1.08 * 256 * TARGET
    assert stage.costs.standing.place == after.control.standing.place > 0
    assert stage.costs.standing.tokens == 128 + 256
    again = stage.run(256)
    assert max(again.control.decisions[0].sizes, default=0) <= 2
    assert again.seconds <= 1.03 * 256 * TARGET, "what was learnt is kept"


def test_it_comes_back_when_the_text_changes() -> None:
    stage = Stage()

    def changing(emitted: int) -> None:
        stage.right["middle"] = 0.0 if 128 <= emitted < 384 else 0.95

    found = stage.run(1024, changing)
    of_part = [{levels for (*_, levels) in found.log[:20]}, {levels for (*_, levels) in found.log[-20:]}]
    assert of_part == [{(0, 1, 2)}, {(0, 1, 2)}]
    decisions = found.control.decisions
    left = next(decision for decision in decisions if decision.levels != (0, 1, 2))
    assert left.reason == "it loses"
    assert 128 <= left.token <= 144, "what 128 tokens have won is not for losing again"
    back = next(decision for decision in decisions if decision.token >= 384 and decision.levels == (0, 1, 2))
    assert back.reason == "trial"
    assert back.token <= 384 + 192
    assert found.control.setup.sizes[0] >= 4, "the trial is over, and sizes are whole again"


def test_a_slower_machine_is_no_reason_to_stop() -> None:
    """All passes take three times as long as in the profile."""
    found = Stage(pace=3.0).run(256)
    assert found.control.setup.levels == (0, 1, 2)
    assert found.seconds < 0.8 * 3 * 256 * TARGET


def test_a_drafter_that_is_right_is_asked_for_long_drafts() -> None:
    stage = Stage(middle=0.05, leaf=0.97, believed=0.05)
    found = stage.run(256)
    assert found.control.setup.levels == (0, 2)
    assert found.control.setup.sizes >= (12,)
    assert found.seconds < 0.4 * 256 * TARGET


def test_nothing_is_tried_at_the_end_of_a_text() -> None:
    stage = Stage(middle=0.0, believed=0.95)
    stage.costs.standing.place, stage.costs.standing.due = 2, {1: 0.0}
    assert {levels for *_, levels in stage.run(15).log} == {(0,)}
    assert {levels for *_, levels in stage.run(40).log} > {(0,)}


def test_a_middle_that_promises_next_to_nothing_is_left_alone() -> None:
    """What is done between two passes is in no table."""
    costs = Costs([[[1, 1.0], [16, 1.0]], [[1, 1.0], [16, 1.0]]], 0.0)
    costs.middle.expected, costs.middle.weight = 1.0, 1e9
    costs.tables[1] = costs.tables[1].scaled(0.95)  # a block of 16 promises 1.048 times the speed
    assert costs.block(1) == 16
    costs.tables[1] = costs.tables[1].scaled(1.03)
    assert 1 < costs.speed_of_block(16) < 1.03
    assert costs.block(1) == 0


@pytest.mark.parametrize("tells", [False, True])
@pytest.mark.parametrize("right", [(0.0, 0.0), (0.0, 0.9), (0.95, 0.0)])
def test_what_goes_on_without_deliberation_is_what_would_have_been_chosen(
    tells: bool, right: tuple[float, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether or not a drafter's drafts are cut by what it says of them."""
    asked: list[bool] = []
    goes_on = SteadyControl._goes_on

    def counted(control: SteadyControl, context: Context, limits: list[int]) -> bool:
        asked.append(goes_on(control, context, limits))
        return asked[-1]

    def told(way: Callable[[SteadyControl, Context, list[int]], bool]) -> Any:
        monkeypatch.setattr(SteadyControl, "_goes_on", way)
        stage = Stage(*right, believed=0.9)
        stage.top.below.below.tells_chances = tells  # type: ignore[attr-defined]

        def turning(emitted: int) -> None:
            if 200 <= emitted < 210 or 400 <= emitted < 410:
                stage.turn(0.95 if emitted < 300 else 0.0)
                stage.right["leaf"] = 0.0 if emitted < 300 else 0.9

        runs = [stage.run(600, turning), stage.run(24)]
        stage.right["leaf"] = 0.0  # what paid in the text before
        runs.append(stage.run(96))
        return [(run.log, run.seconds, run.control.decisions) for run in runs]

    assert told(counted) == told(lambda *_: False)
    assert any(asked) or right[0], "a middle that is right leaves nothing to go on without"
