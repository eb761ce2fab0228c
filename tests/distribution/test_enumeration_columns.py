# SPDX-License-Identifier: Apache-2.0
"""Rows that join and leave while their columns are shared out by what was accepted: the law of every text stays.

What a row drafts depends on its own past and on everybody else's; every outcome of every coin is followed.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from enumeration import CPU, EXACT, TableModel, approximations, outcomes
from joined_rows import Table, drawing, off_the_law, written
from steered_rows import Sayer

from hf_polyspec.control import PassSeconds, Shares, columns, known
from hf_polyspec.control.columns import Columns
from hf_polyspec.exactness.context import Context, Prompt
from hf_polyspec.exactness.proposal import Proposal
from hf_polyspec.exactness.row_laws import RowLaws
from hf_polyspec.generation.loop import DecodingLoop
from hf_polyspec.levels.base import Drafter
from hf_polyspec.levels.causal_lm import CausalLMDrafter
from hf_polyspec.levels.verifier import Verifier


class Ragged(Table):
    """One whose rows have their own columns."""

    own_rows = True


class Still(PassSeconds):
    """Seconds that do not follow a clock: 4 and one a column, so that what pays depends on what was accepted."""

    def __init__(self) -> None:
        super().__init__()
        self.pace, self.cost = 4.0, 1.0

    def add(self, columns: int, seconds: float) -> None:
        self.passes += 1


def chain(tables: list[TableModel], rule: str, *, says: bool = False) -> Verifier:
    level: Any = CausalLMDrafter(tables[-1], name="drafter", draft_tokens=2)  # type: ignore[arg-type]
    level = Sayer(0.8) if says else level
    for table in reversed(tables[1:-1]):
        level = Verifier(table, level, name="middle", rule=rule, block_size=2)  # type: ignore[arg-type]
    return Verifier(tables[0], level, name="target", rule=rule, draft_limit=2)  # type: ignore[arg-type]


def distance(tables: list[TableModel], rule: str, *, says: bool = False) -> float:
    target = chain(tables, rule, says=says)
    genuine = target.ask, target.ask_for_tree

    def begin() -> None:
        target.begin(0, 0, 2)
        level: Any = target
        while isinstance(level, Verifier):
            level.stats.clock = lambda: 0.0
            level = level.below

    def program(replay: Any) -> tuple[Any, Any]:
        level: Any = target
        while isinstance(level, Verifier):
            level.ask, level.ask_for_tree = genuine
            level = level.below
        begin()
        loop = DecodingLoop(target, RowLaws([], [], CPU), control=Shares(target, lambda index: Still()))
        return written(loop, begin, lambda place: drawing(place, replay)), None

    found = {key: weight for key, (weight, _) in outcomes(program).items()}
    assert sum(found.values()) == pytest.approx(1, abs=1e-12)
    return off_the_law(found, tables[0])


@pytest.mark.parametrize("rule", ["token", "block"])
@pytest.mark.parametrize("levels", [2, 3])
def test_columns_that_are_shared_out_leave_the_law(rule: str, levels: int, monkeypatch: pytest.MonkeyPatch) -> None:
    granted: set[tuple[int, ...]] = set()
    genuine = Columns._granted

    def noted(self: Columns, *given: Any) -> list[int]:
        found = genuine(self, *given)
        granted.add(tuple(found))
        return found

    monkeypatch.setattr(Columns, "_granted", noted)
    monkeypatch.setattr(known, "HOPE", 100.0)  # texts of a few tokens: else a middle is never worth its first draft
    assert distance(approximations(levels, 2, 4, Ragged), rule) < EXACT
    assert {0, 1} <= {count for counts in granted for count in counts}, "some rows draft, and others do not"


@pytest.mark.parametrize("rule", ["token", "block"])
def test_a_middle_that_is_passed_by_leaves_the_law(rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: set[tuple[int, str]] = set()
    genuine = Columns._offered

    def noted(self: Columns, source: Drafter, *given: Any) -> Proposal | None:
        found = genuine(self, source, *given)
        if found is not None and any(found.tokens):
            asked.add((self.level.index, source.name))
        return found

    monkeypatch.setattr(Columns, "_offered", noted)
    monkeypatch.setattr(columns, "SOON", 2)
    monkeypatch.setattr(columns, "GUESS", 0.0)
    assert distance(approximations(3, 2, 4, Ragged), rule, says=True) < EXACT
    assert {(0, "middle"), (0, "sayer")} <= asked, "in some rounds the middle is asked, in others past it"


def test_a_size_that_looks_at_what_was_drawn_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """The wrong variant: a drawn draft is cut after a look at its tokens."""
    genuine = Columns.ask

    def looks(self: Columns, *given: Any) -> Proposal:
        offered = genuine(self, *given)
        if offered.q is None:
            return offered
        tokens = [row if row[:1] == [0] else [] for row in offered.tokens]
        origins = [row[: len(own)] for row, own in zip(offered.origins, tokens, strict=True)]
        return Proposal(tokens, offered.q, origins)

    monkeypatch.setattr(Columns, "ask", looks)
    assert distance(approximations(2, 2, 4, Ragged), "token") > 1e-3


@torch.no_grad()
def test_where_nothing_pays_nobody_drafts() -> None:
    """A drafter that is never right and passes that cost a token a column: its own passes are not run either, once it
    is known what they take."""
    tables = approximations(2, 2, 4, Ragged)
    target = chain(tables, "token")
    target.begin(0, 2, 2)
    seconds = Still()
    seconds.pace, seconds.cost = 0.01, 1.0
    shared = Columns(target, seconds)
    asked: list[int] = []
    drafter: Any = target.below
    genuine = drafter.propose
    drafter.propose = lambda context, limits, law: (asked.append(1), genuine(context, limits, law))[1]
    context = Context([[0], [0]], Prompt.apart([1, 1], [0, 1]))
    for _ in range(12):
        target.round(context, [3, 3], RowLaws([drawing(1), drawing(2)], [0, 1], CPU))
    assert len(asked) <= 2
    assert shared.seconds is seconds
