# SPDX-License-Identifier: Apache-2.0
"""A row that is alone where others may join drafts what it would in a call of its own."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch
from clockwork import LAW, Clock, ClockedDrafter, ClockedRunner, Run, truth

from hf_polyspec.control import Costs, PassSeconds, Shares, SteadyControl
from hf_polyspec.exactness.context import Context, Prompt
from hf_polyspec.exactness.distributions import LawMaker
from hf_polyspec.exactness.proposal import Proposal
from hf_polyspec.levels.verifier import Verifier


def pass_seconds(columns: float) -> float:
    return 1 + 0.03 * (columns - 1)


class Teller(ClockedDrafter):
    """Says how likely its tokens are, and may be wrong about it."""

    tells_chances = True

    def propose(self, context: Context, limits: list[int], law: LawMaker) -> Proposal:
        offered = super().propose(context, [min(limit, 6) for limit in limits], law)
        chances = [[0.9**depth for depth in range(1, 1 + len(row))] for row in offered.tokens]
        return replace(offered, chances=lambda: chances)


class Levels:
    """A chain whose drafts take time and are right as often as the test says."""

    def __init__(self, right: float, kind: type[ClockedDrafter], middle_seconds: float = 0.3) -> None:
        self.clock = Clock()
        self.above = ClockedRunner(self.clock, pass_seconds, lambda: 1.0, 4)
        self.below = ClockedRunner(self.clock, lambda columns: middle_seconds * pass_seconds(columns), lambda: 0.8, 3)
        self.drafter = kind(self.clock, lambda: 0.01, lambda: right)
        self.middle = Verifier(self.below, self.drafter, name="middle", block_size=5)
        self.top = Verifier(self.above, self.middle, name="target")

    def begun(self, rows: int) -> Verifier:
        self.top.begin(0, rows, 8)
        for level in (self.top, self.middle, self.drafter):
            level.stats.clock = self.clock
        return self.top

    @property
    def done(self) -> tuple[list[int], list[int], list[int]]:
        """Columns of every pass of both models, and the longest of every draft."""
        return self.above.fed, self.below.fed, self.drafter.asked


def grown(levels: Levels, context: Context, tokens: int) -> Context:
    while any(limits := [max(0, tokens - len(row)) for row in context.ids]):
        context = context.extended(levels.top.round(context, limits, LAW).tokens)
    return context


def prompts(rows: int) -> Context:
    ids = [truth(i) for i in range(4)]
    return Context([list(ids) for _ in range(rows)], Prompt(4, None, torch.arange(4).expand(rows, -1)))


@pytest.mark.parametrize("kind", [ClockedDrafter, Teller])
@pytest.mark.parametrize("right", [0.0, 0.7])
def test_nothing_is_gauged_away_from_a_row_that_is_alone(kind: type[ClockedDrafter], right: float) -> None:
    """Drafts of which hardly any is right would be left out for rows that share a pass."""
    free, shared = Levels(right, kind), Levels(right, kind)
    free.begun(1)
    grown(free, prompts(1), 100)
    control = Shares(shared.begun(1), lambda _: PassSeconds())
    grown(shared, prompts(1), 100)
    assert shared.done == free.done
    timed = control.columns[0].seconds.passes
    assert timed == len(free.above.fed) - 1, "its passes are timed all the same, but not the one that read the prompt"


def test_what_a_lone_row_has_shown_holds_when_others_join() -> None:
    """Of a middle that is never right and as slow as the target, three rows would have to find out."""
    levels = Levels(0.0, ClockedDrafter, middle_seconds=1.0)
    levels.below.agreement = lambda: 0.0
    control = Shares(levels.begun(3), lambda _: PassSeconds())
    levels.above.keep_rows = lambda rows: None  # type: ignore[method-assign]
    grown(levels, prompts(1), 40)
    alone = len(levels.below.fed)
    assert alone >= 36, "a pass of it at least for every token"
    levels.above.memo, levels.below.memo = [], []
    grown(levels, prompts(3), 40)
    assert len(levels.below.fed) - alone <= 2
    assert control.columns[0].seconds.passes > 36


@pytest.mark.parametrize("kind", [ClockedDrafter, Teller])
@pytest.mark.parametrize("right", [0.0, 0.4, 0.95])
@pytest.mark.parametrize("place", [0, 2])
def test_auto_runs_a_lone_row_of_an_engine_as_a_call_of_its_own(
    kind: type[ClockedDrafter], right: float, place: int
) -> None:
    """Also where the target alone was found the quickest before."""
    found = []
    for shares in (False, True):
        levels = Levels(right, kind)
        table = [[columns, pass_seconds(columns)] for columns in (1, 2, 4, 8, 16, 32)]
        costs = Costs([table, [[columns, 0.3 * seconds] for columns, seconds in table]], 0.8)
        costs.standing.place, costs.standing.tokens, costs.standing.due = place, 40.0, {0: 60.0, 1: 60.0}
        Run(levels.clock, levels.top, 150, control=partial(SteadyControl, costs=costs, shares=shares))
        found.append((levels.done, levels.clock.now))
    assert found[0] == found[1]
