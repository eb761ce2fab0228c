# SPDX-License-Identifier: Apache-2.0
"""What an answer may lose to drafts that are believed, and to a middle that was right in the answers before."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
from clockwork import VOCABULARY, Clock, ClockedDrafter, ClockedRunner, Run

from hf_polyspec.control import Costs, SteadyControl
from hf_polyspec.control.cutting import affordable
from hf_polyspec.control.ledger import Account, Ledger, at_first, wait_after
from hf_polyspec.exactness.context import Context
from hf_polyspec.exactness.distributions import LawMaker
from hf_polyspec.exactness.proposal import Proposal
from hf_polyspec.levels.verifier import Verifier

LENGTHS = [16, 64, 128, 256]


def most(tokens: int) -> float:
    return 0.05 if tokens == 16 else 0.03


def seconds(one: float, columns: float) -> float:
    return one * (1 + 0.03 * (columns - 1))


class Liar(ClockedDrafter):
    """Offers 24 tokens, all wrong, of which it is sure, whatever became of those before."""

    tells_chances = True
    most = 24

    def propose(self, context: Context, limits: list[int], law: LawMaker) -> Proposal:
        offered = super().propose(context, [min(self.most, limit) for limit in limits], law)
        rows = [[VOCABULARY - 1] * len(row) for row in offered.tokens]
        return replace(offered, tokens=rows, chances=lambda: [[0.99 ** (1 + i) for i in range(len(r))] for r in rows])


class Stage:
    """A target, alone or over a middle, over a liar."""

    def __init__(self, middle: float | None, believed: float = 0.95) -> None:
        self.clock = Clock()
        self.right = middle or 0.0
        self.leaf = level = Liar(self.clock, lambda: 0.0, lambda: 0.0)
        self.below = Verifier(
            ClockedRunner(self.clock, lambda k: seconds(0.3, k), lambda: self.right, 3), level, name="middle"
        )
        top = ClockedRunner(self.clock, lambda k: seconds(1.0, k), lambda: 1.0, 4)
        self.top = Verifier(top, level if middle is None else self.below, name="target")
        tables = [[[k, seconds(one, k)] for k in (1, 2, 4, 8, 16, 32)] for one in (1.0, 0.3)]
        self.costs = Costs(tables[: 1 if middle is None else 2], believed)

    def lost(self, tokens: int, prompt: int = 1) -> float:
        """The share of the target's own time by which an answer took longer, the prompt's reading left out."""
        began, self.below.runner.memo, self.top.runner.memo = self.clock.now, [], []  # type: ignore[attr-defined]
        Run(self.clock, self.top, tokens, prompt=prompt, control=partial(SteadyControl, costs=self.costs))
        return (self.clock.now - began - 0.03 * (prompt - 1)) / tokens - 1


@pytest.mark.parametrize("prompt", [1, 12])
@pytest.mark.parametrize("tokens", LENGTHS)
def test_drafts_that_are_sure_and_always_wrong(tokens: int, prompt: int) -> None:
    """Also in the pass that reads the prompt."""
    stage = Stage(None)
    assert 0 < stage.lost(tokens, prompt) <= most(tokens)
    assert stage.lost(tokens, prompt) <= most(tokens), "nor in the answer after that"


@pytest.mark.parametrize("believed", [0.05, 0.95])
@pytest.mark.parametrize("tokens", LENGTHS)
def test_below_a_middle_that_is_always_wrong(tokens: int, believed: float) -> None:
    assert Stage(0.0, believed).lost(tokens) <= most(tokens)


@pytest.mark.parametrize("tokens", LENGTHS)
def test_after_a_long_answer_that_was_right(tokens: int) -> None:
    """A middle that is believed may lose two rounds in a row before it is left."""
    stage = Stage(0.97)
    stage.leaf.most = 0
    assert stage.lost(256) < -0.2
    assert stage.costs.middle.proven
    stage.right = 0.0
    stage.below.runner.right.clear()  # type: ignore[attr-defined]
    assert stage.lost(tokens) <= most(tokens)


def test_one_losing_round_of_a_believed_middle_is_bad_luck() -> None:
    account = Account(0.5, patience=2)
    account.book(-3.0, 4.0, 1)
    assert not account.overdrawn
    account.book(0.1, 1.0, 2)
    account.book(-3.0, 4.0, 1)
    assert not account.overdrawn, "two that are not in a row are no worse"
    account.book(-0.1, 1.0, 1)
    assert account.overdrawn
    account = Account(0.5)
    account.book(-3.0, 4.0, 1)
    assert account.overdrawn, "what nobody believes in is left at once"


def test_a_believed_middle_is_tried_again_sooner() -> None:
    account = Account(0.5, most=1)
    account.book(-3.0, 4.0, 1)
    doubted, believed = (wait_after(account, 1.0, 0.0, False, one) for one in (False, True))
    assert believed == 12 < doubted == 150
    assert wait_after(account, 1.0, 12.0, False, True) == 24
    assert wait_after(account, 1.0, 1000.0, False, True) == 150, "until what was lost is a share of the time"


def test_what_may_be_lost_rises_with_what_is_written() -> None:
    ledger = Ledger()
    for tokens in range(257):
        ledger.elapsed = float(tokens)
        for start, besides in ((0.7, 0.0), at_first(tokens) if tokens >= 64 or tokens <= 16 else (0.7, 0.0)):
            allowed = ledger.left(1.0, start, besides) / max(tokens, 1)
            assert allowed <= (0.05 if tokens < 64 else 0.03) or tokens < 16
    assert at_first(16)[0] == 0.7
    assert at_first(16)[1] < 0.1
    assert at_first(4096) == (1.5, 1.2)


def test_a_draft_takes_no_more_columns_than_may_be_lost() -> None:
    assert affordable(24, partial(seconds, 1.0), 0.301) == 11
    assert affordable(24, partial(seconds, 1.0), 10.0) == 24
    assert affordable(24, partial(seconds, 1.0), 0.0) == 1
    assert affordable(0, partial(seconds, 1.0), 0.0) == 0
