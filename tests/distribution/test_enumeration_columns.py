# SPDX-License-Identifier: Apache-2.0
"""Rows that join and leave while their columns are shared out by what was accepted: the law of every text stays.

What a row drafts depends on its own past and on everybody else's; every outcome of every coin is followed.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from enumeration import EXACT, TableModel, approximations, outcomes
from test_enumeration_joining import CPU, LENGTHS, PROMPTS, Table, course, drawing

from hf_polyspec.control import PassSeconds, Shares
from hf_polyspec.control.columns import Columns
from hf_polyspec.exactness.context import Context, Prompt
from hf_polyspec.exactness.proposal import Proposal
from hf_polyspec.exactness.row_laws import RowLaws
from hf_polyspec.generation.loop import DecodingLoop
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


def chain(tables: list[TableModel], rule: str) -> Verifier:
    level: Any = CausalLMDrafter(tables[-1], name="drafter", draft_tokens=2)  # type: ignore[arg-type]
    for table in reversed(tables[1:-1]):
        level = Verifier(table, level, name="middle", rule=rule, block_size=2)  # type: ignore[arg-type]
    return Verifier(tables[0], level, name="target", rule=rule, draft_limit=2)  # type: ignore[arg-type]


def texts(target: Verifier, replay: Any) -> tuple[tuple[int, ...], ...]:
    target.begin(0, 0, 2)
    level: Any = target
    while isinstance(level, Verifier):
        level.stats.clock = lambda: 0.0
        level.ask, level.ask_for_tree = GENUINE
        level = level.below
    control = Shares(target, lambda index: Still())
    loop = DecodingLoop(target, RowLaws([], [], CPU), control=control)
    courses = {place: course(place) for place in PROMPTS}
    waiting, running = [0, 1, 2], list[int]()
    while waiting or running:
        while waiting and len(running) < 2 + (len(waiting) < 2):
            place = waiting.pop(0)
            running.append(place)
            prompt = PROMPTS[place]
            loop.admit(courses[place], Context([list(prompt)], Prompt.apart([len(prompt)], [place])))
        loop.law = RowLaws([drawing(place, replay) for place in running], running, CPU)
        loop.round()
        left = [place for place in running if not courses[place].finished]
        if left:
            loop.keep([at for at, place in enumerate(running) if place in left])
        else:
            loop.seats, loop.context = [], None
        running = left
    return tuple(tuple(courses[place].rows[0].committed[len(PROMPTS[place]) :]) for place in PROMPTS)


GENUINE: Any = ()


def distance(tables: list[TableModel], rule: str) -> float:
    global GENUINE
    target = chain(tables, rule)
    GENUINE = target.ask, target.ask_for_tree
    found = {key: weight for key, (weight, _) in outcomes(lambda replay: (texts(target, replay), None)).items()}
    assert sum(found.values()) == pytest.approx(1, abs=1e-12)
    wanted = dict.fromkeys(found, 1.0)
    for key in found:
        for place, text in enumerate(key):
            assert len(text) == LENGTHS[place]
            for i, token in enumerate(text):
                law = tables[0].law(PROMPTS[place] + text[:i])
                wanted[key] *= float(law.argmax() == token) if place == 1 else float(law[token])
    return (sum(abs(found[key] - wanted[key]) for key in found) + 1 - sum(wanted.values())) / 2


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
    assert distance(approximations(levels, 2, 4, Ragged), rule) < EXACT
    assert {0, 1} <= {count for counts in granted for count in counts}, "some rows draft, and others do not"


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
    """A drafter that is never right and passes that cost a token a column: its own passes are not run either."""
    tables = approximations(2, 2, 4, Ragged)
    target = chain(tables, "token")
    target.begin(0, 1, 2)
    seconds = Still()
    seconds.pace, seconds.cost = 0.01, 1.0
    columns = Columns(target, seconds)
    asked: list[int] = []
    drafter: Any = target.below
    genuine = drafter.propose
    drafter.propose = lambda context, limits, law: (asked.append(1), genuine(context, limits, law))[1]
    context = Context([[0]], Prompt.apart([1], [0]))
    for _ in range(4):
        target.round(context, [3], RowLaws([drawing(1)], [0], CPU))
    assert not asked
    assert columns.seconds is seconds
