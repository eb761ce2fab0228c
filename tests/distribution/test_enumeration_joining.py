# SPDX-License-Identifier: Apache-2.0
"""Rows that join and leave are drawn from the target's law, each for itself, whatever runs beside them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from enumeration import CPU, EXACT, Replay, TableModel, approximations, outcomes
from transformers import StoppingCriteriaList

from hf_polyspec.exactness import judgement
from hf_polyspec.exactness.context import Context, Prompt
from hf_polyspec.exactness.distributions import LawMaker
from hf_polyspec.exactness.passes import Pass
from hf_polyspec.exactness.row_laws import RowLaws
from hf_polyspec.generation.course import Course, Stopping
from hf_polyspec.generation.loop import DecodingLoop
from hf_polyspec.generation.outputs import Recorder, Wanted
from hf_polyspec.levels.causal_lm import CausalLMDrafter
from hf_polyspec.levels.emission import Emission
from hf_polyspec.levels.verifier import Verifier

PROMPTS = {0: (0,), 1: (1, 0), 2: (1,)}
"""By name of a row; the second is greedy, the third joins after the first round."""
LENGTHS = {0: 3, 1: 3, 2: 2}


class Table(TableModel):
    """One whose rows come and go; it remembers nothing of them."""

    def run(self, context: Context, drafts: list[list[int]], stats: Any) -> Pass:
        return replace(super().run(context, drafts, stats), read=context.extended(drafts).ids)

    def keep_rows(self, rows: list[int]) -> None:
        pass

    def add_rows(self, count: int) -> None:
        pass


class Rounds(Verifier):
    """Every round is drawn in one choice, from the table of what the real one does with all outcomes of its coins."""

    tables: dict[Any, dict[Any, tuple[float, Any]]]
    replay: Replay

    def round(self, context: Context, limits: list[int], law: LawMaker) -> Emission:
        assert isinstance(law, RowLaws)
        key = tuple(map(tuple, context.ids)), tuple(context.places), tuple(limits)
        if key not in self.tables:

            def program(replay: Replay) -> tuple[Any, Any]:
                own = RowLaws([drawing(place, replay) for place in context.places], list(context.places), CPU)
                emission = super(Rounds, self).round(context, limits, own)
                return tuple(map(tuple, emission.tokens)), emission

            self.tables[key] = outcomes(program)
        table = list(self.tables[key].values())
        weights = torch.tensor([[probability for probability, _ in table]], dtype=torch.float64)
        emission: Emission = table[int(self.replay.categorical(weights)[0])][1]
        return emission


def drawing(place: int, replay: Replay | None = None) -> LawMaker:
    return LawMaker([], place != 1, CPU, replay)


def course(place: int) -> Course:
    prompt = PROMPTS[place]
    stopping = Stopping(len(prompt) + LENGTHS[place], frozenset(), False, [], StoppingCriteriaList())
    recorder = Recorder(Wanted(), 1, len(prompt), None)
    return Course([prompt], drawing(place), stopping, pad=0, device=CPU, recorder=recorder)


def texts(target: Rounds, replay: Replay) -> tuple[tuple[int, ...], ...]:
    """What the rows come to, as an engine lets them in and out."""
    target.begin(0, 0, 2)
    target.replay = replay
    loop = DecodingLoop(target, RowLaws([], [], CPU))
    courses = {place: course(place) for place in PROMPTS}
    waiting, running = [0, 1, 2], list[int]()
    while waiting or running:
        while waiting and len(running) < 2 + (len(waiting) < 2):
            place = waiting.pop(0)
            running.append(place)
            prompt = PROMPTS[place]
            loop.admit(courses[place], Context([list(prompt)], Prompt.apart([len(prompt)], [place])))
        loop.law = RowLaws([courses[place].law for place in running], running, CPU)
        loop.round()
        left = [place for place in running if not courses[place].finished]
        if left:
            loop.keep([at for at, place in enumerate(running) if place in left])
        elif waiting:
            loop.seats, loop.context = [], None
            target.begin(0, 0, 2)
        running = left
    return tuple(tuple(courses[place].rows[0].committed[len(PROMPTS[place]) :]) for place in PROMPTS)


def chain(tables: list[TableModel], rule: str) -> Rounds:
    level: Any = CausalLMDrafter(tables[-1], name="drafter", draft_tokens=1)
    for table in reversed(tables[1:-1]):
        level = Verifier(table, level, name="middle", rule=rule, block_size=2)
    target = Rounds(tables[0], level, name="target", rule=rule, draft_limit=2)
    target.tables = {}
    return target


def distance(tables: list[TableModel], rule: str) -> float:
    """Total variation between the law of the three texts and what it should be: independent, the second certain."""
    target = chain(tables, rule)

    def program(replay: Replay) -> tuple[Any, Any]:
        return texts(target, replay), None

    found = {key: probability for key, (probability, _) in outcomes(program).items()}
    wanted = dict.fromkeys(found, 1.0)
    for key in found:
        for place, text in enumerate(key):
            for i, token in enumerate(text):
                law = tables[0].law(PROMPTS[place] + text[:i])
                wanted[key] *= float(law.argmax() == token) if place == 1 else float(law[token])
    missing = 1 - sum(wanted.values())
    return (sum(abs(found[key] - wanted[key]) for key in found) + missing) / 2


@pytest.mark.parametrize("rule", ["token", "block"])
@pytest.mark.parametrize("levels", [2, 3])
def test_rows_that_join_and_leave(rule: str, levels: int) -> None:
    assert distance(approximations(levels, 2, 4, Table), rule) < EXACT


def test_a_law_that_is_told_to_another_row_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    right = judgement.spread

    def wrong(like: torch.Tensor, parts: Any) -> torch.Tensor:
        return right(like, parts).flip(0)

    monkeypatch.setattr(judgement, "spread", wrong)
    assert distance(approximations(3, 2, 4, Table), "token") > 1e-3
