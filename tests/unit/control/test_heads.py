# SPDX-License-Identifier: Apache-2.0
"""A head below a middle beside a drafter that costs nothing: each is asked for as much as pays at the moment."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from clockwork import LAW, VOCABULARY, Clock, ClockedRunner, Run, truth

from hf_polyspec.control import Costs, Setup, SteadyControl
from hf_polyspec.control.costs import HEAD, STEPS, Head, Share
from hf_polyspec.control.cutting import Cut
from hf_polyspec.exactness.context import Context, Prompt
from hf_polyspec.exactness.distributions import LawMaker
from hf_polyspec.exactness.proposal import Proposal
from hf_polyspec.levels.base import Drafter
from hf_polyspec.levels.joined import JoinedDrafter
from hf_polyspec.levels.sequential import SequentialDrafter
from hf_polyspec.levels.verifier import Verifier

TARGET, MIDDLE, STEP = 1.0, 0.4, 0.05


def seconds(one: float, columns: float) -> float:
    return one * (1 + 0.02 * (columns - 1))


def some(ids: list[int], count: int, right: float, dice: random.Random) -> list[int]:
    return [truth(len(ids) + i) if dice.random() < right else VOCABULARY - 2 for i in range(count)]


class ClockedHead(SequentialDrafter):
    """Draws as many tokens as it is set to, each of which takes its time."""

    def __init__(self, clock: Clock, right: Callable[[], float]) -> None:
        super().__init__(name="head", draft_tokens=4, confidence_threshold=0, schedule="constant", eos=frozenset())
        self.clock, self.right, self.dice = clock, right, random.Random(3)
        self.asked: list[tuple[float, int]] = []

    def propose(self, context: Context, limits: list[int], law: LawMaker) -> Proposal:
        count = min(self.draft_tokens, limits[0])
        if count:
            self.asked.append((self.clock.now, count))
        self.clock.now += count * STEP
        tokens = [some(context.ids[0], count, self.right(), self.dice)]
        return Proposal(tokens, None, [[self.index] * count])


class Finder(Drafter):
    """Finds something in the text from time to time, as much of it right as the test says, and often nothing."""

    def long_is_sure(self, device: torch.device) -> bool:
        return True

    def __init__(self, finds: Callable[[], float], right: Callable[[], float]) -> None:
        super().__init__()
        self.finds, self.right, self.dice = finds, right, random.Random(5)
        self.limits: list[int] = []

    def propose(self, context: Context, limits: list[int], law: LawMaker) -> Proposal:
        self.limits.append(limits[0])
        count = limits[0] if self.dice.random() < self.finds() else 0
        return Proposal([some(context.ids[0], count, self.right(), self.dice)], None, [[self.index] * count])


class Stage:
    """Target, middle, and both drafters, each as right as `shares` says at the moment."""

    def __init__(self, head: float = 0.8, expected: float = 0.8) -> None:
        self.clock = Clock()
        self.shares = {"middle": 0.95, "head": head, "finds": 0.0, "found": 1.0}
        self.head = ClockedHead(self.clock, lambda: self.shares["head"])
        self.finder = Finder(lambda: self.shares["finds"], lambda: self.shares["found"])
        points = [[[k, seconds(one, k)] for k in (1, 2, 4, 8, 16, 32)] for one in (TARGET, MIDDLE)]
        self.costs = Costs(points, 0.95, Head(expected, STEP))
        runner = ClockedRunner(self.clock, lambda k: seconds(MIDDLE, k), lambda: self.shares["middle"], 3)
        leaf = JoinedDrafter(self.head, self.finder, direct_tokens=4)
        self.middle = Verifier(runner, leaf, name="middle")
        self.top = Verifier(
            ClockedRunner(self.clock, lambda k: seconds(TARGET, k), lambda: 1.0, 4), self.middle, name="target"
        )

    def run(self, tokens: int, during: Callable[[int], None] = lambda emitted: None) -> Run:
        for verifier in (self.top, self.middle):
            verifier.runner.memo = []  # type: ignore[attr-defined]
        found = Run(
            self.clock,
            self.top,
            tokens,
            prompt=1,
            during=during,
            control=lambda top, clock: SteadyControl(top, self.costs, clock=clock),
        )
        assert found.text == [[truth(1 + i) for i in range(tokens)]]
        return found


def test_a_head_that_is_right_speeds_the_middle_up() -> None:
    stage, without = Stage(head=0.8), Stage(head=0.0, expected=0.0)
    without.costs.standing.due[HEAD] = float("inf")
    assert stage.run(256).seconds < 0.8 * without.run(256).seconds
    assert not without.head.asked
    assert max(count for _, count in stage.head.asked) > 2


@pytest.mark.parametrize("expected", [0.3, 0.9])
def test_a_head_that_is_always_wrong_costs_little(expected: float) -> None:
    with_it = without_it = 0.0
    for seed in range(8):  # now and then a middle is left for being unlucky, in one of both alone
        stage, without = Stage(head=0.0, expected=expected), Stage(head=0.0, expected=0.0)
        without.costs.standing.due[HEAD] = float("inf")
        for one in (stage, without):
            one.middle.runner.dice = random.Random(seed)  # type: ignore[attr-defined]
        with_it, without_it = with_it + stage.run(512).seconds, without_it + without.run(512).seconds
        assert not without.head.asked
        assert sum(count for _, count in stage.head.asked) * STEP < 0.04 * stage.clock.now
    assert with_it <= 1.04 * without_it


def test_a_head_is_asked_again_when_the_text_changes() -> None:
    stage = Stage(head=0.8)
    moments: dict[int, float] = {}

    def changing(emitted: int) -> None:
        moments.setdefault(emitted // 256, stage.clock.now)
        stage.shares["head"] = 0.0 if 256 <= emitted < 512 else 0.9

    found = stage.run(1024, changing)
    asked = [sum(begin <= when < begin + 20 for when, _ in stage.head.asked) for begin in moments.values()]
    late = sum(count for when, count in stage.head.asked if moments[1] + 20 <= when < moments[2])
    assert late * STEP < 0.02 * (moments[2] - moments[1])
    assert asked[3] > 15
    assert found.control.setup.head in STEPS[2:]


def test_what_is_found_is_offered_in_long_drafts_that_pass_the_middle_by() -> None:
    """A copy: no size of the head's limits it, and what the target keeps of it is no merit of the middle."""
    stage = Stage()
    stage.shares |= {"finds": 1.0, "middle": 0.0}
    found = stage.run(512)
    assert found.control.setup.sizes[-1] == 24
    assert found.seconds < 512 * TARGET / 11, "what loses beside it is not tried every hundred tokens"
    assert stage.costs.leaf.value > 0.95
    assert stage.costs.middle.tried < 6, "hardly anything was its own"
    assert found.control.setup.levels != (0,)


def test_what_was_found_and_is_wrong_is_no_fault_of_the_middle_or_the_head() -> None:
    stage = Stage()
    stage.shares |= {"finds": 0.5, "found": 0.0}
    found = stage.run(256)
    assert stage.costs.leaf.value < 0.4
    assert stage.costs.middle.value > 0.8
    assert stage.costs.head is not None
    assert stage.costs.head.value > 0.6
    assert found.control.setup.sizes[-1] <= 3


def test_under_the_target_alone_a_head_that_reads_the_middle_rests() -> None:
    stage = Stage()
    stage.shares["middle"] = 0.0
    found = stage.run(128)
    two = [decision for decision in found.control.decisions if decision.levels == (0, 2)]
    assert two
    begin = stage.clock.now
    stage.costs.standing.place = 1
    stage.costs.standing.due = {0: float("inf"), 1: float("inf")}
    stage.run(64)
    assert not [when for when, _ in stage.head.asked if when > begin]
    assert stage.finder.limits


def test_sizes_of_both_parts() -> None:
    stage = Stage()
    leaf = stage.middle.below
    assert isinstance(leaf, JoinedDrafter)
    setup = Setup((0, 1, 2), (8, 24), head=4)
    assert setup.at_most(2) == Setup((0, 1, 2), (2, 2), head=2)
    leaf.share_out(3, 24)
    assert (stage.head.draft_tokens, leaf.branch_limit, leaf.rests) == (3, 24, False)
    leaf.share_out(0, 6)
    assert (stage.head.draft_tokens, leaf.branch_limit, leaf.rests) == (3, 6, True)
    with pytest.raises(TypeError, match="drafts no chain of a given length"):
        JoinedDrafter(stage.finder, stage.finder).share_out(1, 1)


def test_an_expectation_fades_where_it_is_to() -> None:
    firm, fading = Share(0.9, 12.0), Share(0.9, 12.0, least=3.0)
    for _ in range(40):
        firm.add(2, 0)
        fading.add(2, 0)
    assert firm.value > 0.45
    assert fading.value < 0.25
    fading.hope(0.75)
    assert fading.value == pytest.approx(0.9)


@pytest.mark.parametrize(("column", "wanted"), [(0.0, 6), (0.5, 2), (30.0, 0)])
def test_a_draft_is_cut_where_its_own_chances_no_longer_pay(column: float, wanted: int) -> None:
    """Of a draft that was found; what a head has guessed in another row, of which nothing is said, stays."""
    stage = Stage()
    found = Proposal([[1] * 6, [2, 2, 2]], None, [[2] * 6, [1] * 3], lambda: [[0.9, 0.8, 0.3, 0.2, 0.1, 0.1], []])
    stage.top.ask = lambda *given: found
    cut = Cut(stage.top, lambda columns: 1.0 + column * columns)
    context = Context([[1], [1]], Prompt.apart([1, 1], [0, 1]))
    offered = stage.top.ask(stage.finder, context, [8, 0], LAW, VOCABULARY, ())
    assert offered.tokens == [[1] * wanted, [2, 2, 2]]
    assert offered.origins == [[2] * wanted, [1] * 3]
    assert stage.finder.stats.drafted == wanted - 6
    drawn = Proposal([[1] * 6], torch.ones(1, 6, VOCABULARY), [[2] * 6], lambda: [[0.0] * 6])
    cut._ask = lambda *given: drawn
    assert stage.top.ask(stage.finder, context, [8, 0], LAW, VOCABULARY, ()) is drawn, "it must not be looked at"


def test_a_copy_is_offered_whole_as_soon_as_it_has_begun() -> None:
    """Whatever became of drafts before: a control that only counted those would need many rounds."""
    stage = Stage()
    stage.costs.leaf.kept, stage.costs.leaf.tried = 0.0, 10.0
    stage.finder.tells_chances = True
    genuine = stage.finder.propose

    def telling(context: Context, limits: list[int], law: LawMaker) -> Proposal:
        return replace(genuine(context, limits, law), chances=lambda: [[0.97**i for i in range(1, 25)]])

    stage.finder.propose = telling  # type: ignore[method-assign]
    stage.shares["finds"] = 1.0
    stage.costs.standing.tokens = 1.0
    stage.run(100)
    assert stage.finder.limits[0] == 24
    assert len(stage.finder.limits) < 10
