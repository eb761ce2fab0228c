# SPDX-License-Identifier: Apache-2.0
"""Rows under the control that "auto" uses, on a clock that follows from the passes that are over.

Passes of a level take another time after so many of its passes, so that what paid comes to lose in the course of a text
and pays again later. All outcomes of all coins are followed.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from clockwork import Clock
from enumeration import CPU, Replay, TableModel, outcomes, total_variation
from joined_rows import Table

from hf_polyspec.control import Costs, SteadyControl, costs, known, ledger, steady
from hf_polyspec.control.costs import Head
from hf_polyspec.exactness.context import Context, Prompt
from hf_polyspec.exactness.distributions import LawMaker
from hf_polyspec.exactness.passes import Pass
from hf_polyspec.exactness.proposal import Proposal
from hf_polyspec.host.lending import WORTH
from hf_polyspec.levels.base import Drafter
from hf_polyspec.levels.causal_lm import CausalLMDrafter
from hf_polyspec.levels.verifier import Verifier

PROMPTS = ((0,), (1, 0, 1))
SLOW: dict[int, tuple[int, ...]] = {0: (), 1: (1, 2), 2: (2, 3, 4)}
"""By level (2 is the drafter), which of its passes take `TIMES` times what they take otherwise."""
TIMES = 12.0
ONE = {0: 1.0, 1: 0.2, 2: 0.05}
"""By level, seconds of a pass over one column."""
Texts = tuple[tuple[int, ...], ...]
Course = tuple[tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]], ...]
"""Round by round: the levels and sizes that were set up, and the tokens of each row that the target was offered."""


class Timed(Table):
    """One whose passes take time on a clock, each row over its own columns."""

    own_rows = True
    lender, borrows_from = None, WORTH
    clock: Clock
    level, passes = 0, 0

    def run(self, context: Context, drafts: list[list[int]], stats: Any) -> Pass:
        columns = sum(1 + len(draft) for draft in drafts)
        slow = TIMES if self.passes in SLOW[self.level] else 1.0
        self.passes += 1
        self.clock.now += slow * seconds(self.level, columns)
        return super().run(context, drafts, stats)


class Sayer(Drafter):
    """Draws nothing, and says how likely its tokens are: sometimes, and behind other texts by so much less."""

    name = "sayer"
    tells_chances = True

    def __init__(self, less: float = 0.7) -> None:
        super().__init__()
        self.less = less

    def propose(self, context: Context, limits: list[int], law: LawMaker) -> Proposal:
        texts = [sum(ids) for ids in context.ids]
        tokens = [[(text + i) % 2 for i in range(min(2, limit))] for text, limit in zip(texts, limits, strict=True)]
        chances = [[0.9 - self.less * (text % 2)] * len(row) for text, row in zip(texts, tokens, strict=True)]
        return Proposal(tokens, None, [[self.index] * len(row) for row in tokens], lambda: chances)


def seconds(level: int, columns: float) -> float:
    """Of a pass."""
    return ONE[level] * (1 + 0.02 * (columns - 1))


def measured(levels: int, *, says: bool) -> Costs:
    """What a profile says of a chain."""
    tables = [[[columns, seconds(level, columns)] for columns in (1, 2, 4, 8)] for level in range(levels - 1)]
    return Costs(tables, 0.9, None if says else Head(0.8, ONE[levels - 1]))


def chain(tables: Sequence[TableModel], rule: str, clock: Clock, rows: int, *, says: bool) -> Verifier:
    """The levels, begun, on that clock."""
    for place, table in enumerate(tables):
        assert isinstance(table, Timed)
        table.clock, table.level, table.passes = clock, place if place < len(tables) - 1 else 2, 0
    level: Any = Sayer() if says else CausalLMDrafter(tables[-1], name="drafter", draft_tokens=2)  # type: ignore[arg-type]
    for table in reversed(tables[1:-1]):
        level = Verifier(table, level, name="middle", rule=rule, block_size=2)  # type: ignore[arg-type]
    top = Verifier(tables[0], level, name="target", rule=rule)  # type: ignore[arg-type]
    top.begin(0, rows, 2)
    tell_time(top, clock)
    return top


def tell_time(top: Verifier, clock: Clock) -> None:
    """All levels look at this clock."""
    level: Any = top
    while level is not None:
        level.stats.clock = clock
        level = level.below if isinstance(level, Verifier) else None


def generated(
    top: Verifier, control: Any, prompts: Texts, lengths: Sequence[int], replay: Replay | None
) -> tuple[Texts, Course]:
    """One generation: what the rows came to, and how it was run."""
    course: list[Any] = []
    prompt = Prompt.apart([len(row) for row in prompts], list(range(len(prompts))))
    context, law = Context([list(row) for row in prompts], prompt), LawMaker([], True, CPU, replay)
    goals = [len(row) + length for row, length in zip(prompts, lengths, strict=True)]
    while any(limits := [goal - len(ids) for goal, ids in zip(goals, context.ids, strict=True)]):
        control.before(context, limits)
        emission = top.round(context, limits, law)
        control.after(emission)
        context = context.extended(emission.tokens)
        course.append((control.setup.levels, control.setup.sizes, tuple(emission.drafted)))
    control.finish()
    return tuple(tuple(ids[len(row) :]) for ids, row in zip(context.ids, prompts, strict=True)), tuple(course)


def off_the_product(found: dict[Any, float], target: TableModel, prompts: Texts, lengths: Sequence[int]) -> float:
    """Total variation between a law of texts and the target's, each row for itself."""
    assert sum(found.values()) == pytest.approx(1, abs=1e-12)
    wanted: dict[Any, float] = {}
    for texts in itertools.product(*(itertools.product((0, 1), repeat=length) for length in lengths)):
        wanted[texts] = 1.0
        for prompt, text in zip(prompts, texts, strict=True):
            for i, token in enumerate(text):
                wanted[texts] *= float(target.law(prompt + text[:i])[token])
    return total_variation(found, wanted)


def off_the_law(
    tables: Sequence[TableModel],
    rule: str,
    lengths: Sequence[int],
    *,
    says: bool = False,
    shares: bool = True,
    kind: Callable[..., SteadyControl] = SteadyControl,
) -> tuple[float, set[Course]]:
    """How far texts are from the target's law, and all the ways in which they were written."""
    prompts, courses = PROMPTS[: len(lengths)], set[Course]()

    def program(replay: Replay) -> tuple[Any, None]:
        clock = Clock()
        top = chain(tables, rule, clock, len(lengths), says=says)
        control = kind(top, measured(len(tables), says=says), shares=shares, clock=clock)
        texts, course = generated(top, control, prompts, lengths, replay)
        courses.add(course)
        return texts, None

    found = {key: weight for key, (weight, _) in outcomes(program).items()}
    return off_the_product(found, tables[0], prompts, lengths), courses


def hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    """Numbers of a control for texts of a few tokens: it soon gives up what loses, and soon tries it again."""
    for module, name, value in (
        (steady, "LAST", 1),
        (steady, "EVERY", 1),
        (steady, "DRAFTS", (1, 2)),
        (steady, "BLOCKS", (1, 2)),
        (costs, "DRAFTS", (1, 2)),
        (costs, "BLOCKS", (1, 2)),
        (costs, "STEPS", (0, 1, 2)),
        (steady, "CREDIT", 0.1),
        (ledger, "START", 8.0),
        (steady, "START", 8.0),
        (ledger, "FIRST_WAIT", 1.0),
        (ledger, "SHORTEST_WAIT", 1.0),
        (steady, "SHORTEST_WAIT", 1.0),
        (ledger, "LONGEST_WAIT", 2.0),
        (ledger, "UNSEEN_WAIT", 1.0),
        (steady, "PATIENCE", 1),
        (steady, "LONGER", 1),
        (known, "HOPE", 100.0),
    ):
        monkeypatch.setattr(module, name, value)
