# SPDX-License-Identifier: Apache-2.0
"""A middle's blocks end where it is unsure, on a clock: quicker than of one length, and nothing is miscounted."""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from clockwork import LAW, VOCABULARY, Clock, ClockedDrafter, ClockedRunner, Run, truth

from hf_polyspec.control import Costs, SteadyControl, steady
from hf_polyspec.control.ending import WorthEnding, ending_of
from hf_polyspec.control.setups import Chain, spine
from hf_polyspec.exactness.context import Context, Prompt
from hf_polyspec.exactness.distributions import LawMaker
from hf_polyspec.exactness.passes import Pass
from hf_polyspec.exactness.proposal import Proposal
from hf_polyspec.host.ranks import ALONE
from hf_polyspec.levels.base import Drafter
from hf_polyspec.levels.elsewhere import Relay, Relayed
from hf_polyspec.levels.joined import JoinedDrafter
from hf_polyspec.levels.verifier import Verifier

TARGET, MIDDLE, SCALE = 1.0, 0.3, 0.25
SURE, UNSURE = 8.0, 0.05


def seconds(one: float, columns: float) -> float:
    return one * (1 + 0.03 * (columns - 1))


class Leading(ClockedRunner):
    """Its choices are ahead by what `lead` says of a place at which it is right, or is not."""

    lead: Callable[[bool], float] = staticmethod(lambda right: SURE)

    def run(self, context: Context, drafts: list[list[int]], stats: Any, *, columns: int = 0) -> Pass:
        passed = super().run(context, drafts, stats, columns=columns)
        for b, ids in enumerate(context.ids):
            for i in range(len(drafts[b]) + 1):
                self.choice(len(ids) + i)
                passed.logits[b, i] *= self.lead(self.right[len(ids) + i])
        return passed


class Finder(Drafter):
    """Finds `count` tokens, right or wrong, and says how likely they are; nobody drew them."""

    tells_chances = True

    def __init__(self, count: int = 0, right: bool = True, chance: float = 0.98) -> None:
        super().__init__()
        self.count, self.right, self.chance = count, right, chance
        self.judged: list[tuple[int, int]] = []

    def propose(self, context: Context, limits: list[int], law: LawMaker) -> Proposal:
        lengths = [min(self.count, limit) for limit in limits]
        rows = [[self.token(len(ids) + i) for i in range(n)] for ids, n in zip(context.ids, lengths, strict=True)]
        self.stats.drafted += sum(map(len, rows))
        chances = [[self.chance ** (i + 1) for i in range(len(row))] for row in rows]
        return Proposal(rows, None, [[self.index] * len(row) for row in rows], lambda: chances)

    def token(self, place: int) -> int:
        return (truth(place) + (not self.right)) % (VOCABULARY - 1)

    def observe(self, drafted: list[int], accepted: list[int]) -> None:
        for proposed, kept in zip(drafted, accepted, strict=True):
            if proposed:
                self.stats.accepted += kept
                self.judged.append((proposed, kept))


class Stage:
    """A target over a copy of it, right at a share of the places, over something that may find a draft."""

    def __init__(self, right: float = 1.0, leaf: Drafter | None = None, seed: int = 3) -> None:
        self.clock = Clock()
        self.costs = Costs(
            [[[k, seconds(one, k)] for k in (1, 2, 4, 8, 16, 32)] for one in (TARGET, MIDDLE)], 0.95, scale=SCALE
        )
        self.leaf = leaf or Finder()
        self.copy = Leading(self.clock, lambda k: seconds(MIDDLE, k), lambda: right, 3)
        self.copy.dice = random.Random(seed)
        self.middle = Verifier(self.copy, self.leaf, name="middle", block_size=16)
        self.target = ClockedRunner(self.clock, lambda k: seconds(TARGET, k), lambda: 1.0, 4)
        self.top = Verifier(self.target, self.middle, name="target")

    def run(self, tokens: int, **more: Any) -> Run:
        found = Run(self.clock, self.top, tokens, prompt=1, control=partial(SteadyControl, costs=self.costs), **more)
        assert found.text == [[truth(1 + i) for i in range(tokens)]] * len(found.text)
        assert self.middle.ending is None, "given back"
        return found

    def begun(self) -> WorthEnding:
        """Ready to be asked for one block."""
        self.top.begin(0, 1, VOCABULARY)
        ending = ending_of(Chain(spine(self.top)), self.costs)
        assert ending is not None
        return ending

    def block(self, limit: int = 64) -> list[int]:
        context = Context([[truth(i) for i in range(3)]], Prompt(3, None, torch.arange(3)[None]))
        return self.middle.propose(context, [limit], LAW).tokens[0]


def test_small_leads_of_wrong_tokens_are_worth_time() -> None:
    """The same tokens, right and wrong at the same places; only what is seen of them differs."""
    times = {}
    for told in (True, False):
        times[told] = 0.0
        for seed in range(3):
            stage = Stage(0.8, seed=seed)
            stage.copy.lead = (lambda right: SURE if right else UNSURE) if told else lambda right: SURE
            times[told] += stage.run(192).seconds
    assert times[True] < 0.92 * times[False]


def test_a_long_sure_stretch_goes_up_in_one_piece() -> None:
    stage = Stage()
    stage.begun()
    assert len(stage.block()) == 16
    assert len(stage.block(limit=9)) == 9


def test_an_unsure_token_ends_its_block_and_goes_up_with_it() -> None:
    stage = Stage()
    stage.begun()
    stage.copy.right = {3 + i: i != 4 for i in range(40)}
    stage.copy.lead = lambda right: SURE if right else UNSURE
    block = stage.block()
    assert block == [truth(3 + i) for i in range(4)] + [VOCABULARY - 1]
    assert stage.middle.checked == [5]


def test_a_long_sure_draft_goes_up_at_once_and_unchecked() -> None:
    stage = Stage(leaf=Finder(12))
    stage.begun()
    assert stage.block() == [truth(3 + i) for i in range(12)]
    assert stage.copy.fed == [], "the middle has not looked at it"
    assert stage.middle.checked == [0]


def test_a_draft_that_is_worth_nothing_is_left_out() -> None:
    """And not counted as offered."""
    stage = Stage(leaf=Finder(12, right=False, chance=0.002))
    stage.begun()
    stage.copy.lead = lambda right: UNSURE
    assert stage.block() == [truth(3)], "nothing stands behind the unsure token"
    assert stage.middle.checked == [1]
    assert stage.leaf.stats.drafted == 0


def test_a_draft_stands_behind_what_is_held() -> None:
    """As much of it as its chances are worth, where the middle is no longer sure."""
    stage = Stage(leaf=Finder(3, chance=0.6))
    ending = stage.begun()
    assert ending.choose(stage.leaf, 0, Proposal([[]], None, [[]], lambda: [[]]))[0] is False
    ending.add(16, [SURE] * 16)
    offered = Proposal([[1, 2, 3]], None, [[2, 2, 2]], lambda: [[0.9, 0.5, 0.01]])
    ends, left = ending.choose(stage.leaf, 16, offered)
    assert (ends, left.tokens) == (True, [[1, 2]])
    assert stage.leaf.stats.drafted == -1


def test_a_draft_takes_no_more_columns_than_may_be_lost() -> None:
    stage = Stage(leaf=Finder(12))
    ending = stage.begun()
    ending.spare = 0.0
    offered = Proposal([[1] * 12], None, [[2] * 12], lambda: [[0.98 ** (i + 1) for i in range(12)]])
    assert ending.choose(stage.leaf, 0, offered)[1].width == 1


def test_a_block_takes_no_more_rounds_once_it_is_full() -> None:
    for size in (1, 2, 5):
        stage = Stage(leaf=Finder(0))
        stage.begun()
        stage.middle.block_size = size
        assert len(stage.block()) == size


@pytest.mark.parametrize("right", [True, False])
def test_what_is_offered_and_kept_is_counted_once(right: bool) -> None:
    leaf = Finder(6, right=right, chance=0.9)
    stage = Stage(0.9, leaf)
    stage.copy.lead = lambda right: SURE if right else UNSURE
    found = stage.run(200)
    assert sum(kept for _, kept in leaf.judged) == leaf.stats.accepted
    # What stood behind a token that was refused was offered, and nobody has judged it.
    assert sum(proposed for proposed, _ in leaf.judged) <= leaf.stats.drafted
    if right:
        assert leaf.stats.accepted > 100
        assert found.seconds < 0.5 * 200 * TARGET
    else:
        assert leaf.stats.accepted == 0


class Head(ClockedDrafter):
    """Drafts without a word on how likely its tokens are."""

    def propose(self, context: Context, limits: list[int], law: LawMaker) -> Proposal:
        offered = super().propose(context, [min(3, limit) for limit in limits], law)
        self.stats.drafted += offered.width
        return offered


def test_of_two_drafters_the_one_that_drafted_is_told_what_was_left_out() -> None:
    head, branch = Head(Clock(), lambda: 0.0, lambda: 1.0), Finder(0)
    stage = Stage(leaf=JoinedDrafter(head, branch))
    ending = stage.begun()
    stage.middle.block_size = 1
    assert len(stage.block()) == 4
    assert ending.choose(stage.leaf, 4, Proposal([[1, 2, 3]], None, [[2, 2, 2]]))[1].tokens == [[]]
    assert (head.stats.drafted, branch.stats.drafted) == (3 - 3, 0)


def test_rows_of_a_batch_have_blocks_of_the_size_that_promises_most() -> None:
    """Nobody ends theirs, and whole ones of a row that is alone would go on behind unsure tokens."""
    for shares in (False, True):
        stage = Stage(0.8)
        stage.costs.middle.expected = 0.8
        made = partial(SteadyControl, costs=stage.costs, shares=shares)
        top = stage.top
        top.begin(0, 2, VOCABULARY)
        control = made(top, clock=stage.clock)
        ids = [[truth(0)], [truth(0)]]
        context = Context(ids, Prompt(1, None, torch.zeros(2, 1, dtype=torch.long)))
        for limits in ([64, 64], [64, 0]):
            control._account = control._opened(None)
            control.before(context, limits)
            rows = 1 if shares else sum(limit > 0 for limit in limits)
            assert control._own.sizes[0] == stage.costs.block(rows) < 16
        assert not control._believes(0)
        control.finish()


def test_a_middle_whose_passes_are_shared_ends_blocks_alike_everywhere() -> None:
    """What this process alone knows ends none."""
    stage = Stage()
    stage.top.begin(0, 1, VOCABULARY)
    relayed = Relayed(Relay(ALONE))
    stage.middle.ask = relayed.ask
    assert ending_of(Chain(spine(stage.top)), stage.costs) is None
    assert stage.middle.ending is None


def test_a_middle_that_was_right_is_not_left_for_two_unlucky_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    took = {}
    for rounds in (steady.PATIENCE, steady.LONGER):
        monkeypatch.setattr(steady, "LONGER", rounds)
        stage = Stage(0.94, seed=5)
        stage.run(128)
        assert stage.costs.middle.proven
        found = stage.run(256)
        took[rounds] = found.seconds
        left = [decision for decision in found.control.decisions if decision.reason == "it loses"]
        assert len(left) == (rounds == steady.PATIENCE)
    assert took[4] < 0.97 * took[2]
