# SPDX-License-Identifier: Apache-2.0
"""Rows that join and leave are drawn from the target's law, each for itself, whatever runs beside them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from enumeration import CPU, EXACT, Replay, TableModel, approximations, outcomes
from joined_rows import Table, drawing, off_the_law, written

from hf_polyspec.exactness import judgement
from hf_polyspec.exactness.context import Context
from hf_polyspec.exactness.distributions import LawMaker
from hf_polyspec.exactness.row_laws import RowLaws
from hf_polyspec.generation.loop import DecodingLoop
from hf_polyspec.levels.causal_lm import CausalLMDrafter
from hf_polyspec.levels.emission import Emission
from hf_polyspec.levels.verifier import Verifier


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


def chain(tables: list[TableModel], rule: str) -> Rounds:
    level: Any = CausalLMDrafter(tables[-1], name="drafter", draft_tokens=1)
    for table in reversed(tables[1:-1]):
        level = Verifier(table, level, name="middle", rule=rule, block_size=2)
    target = Rounds(tables[0], level, name="target", rule=rule, draft_limit=2)
    target.tables = {}
    return target


def distance(tables: list[TableModel], rule: str) -> float:
    target = chain(tables, rule)

    def program(replay: Replay) -> tuple[Any, Any]:
        target.replay = replay
        return written(DecodingLoop(target, RowLaws([], [], CPU)), lambda: target.begin(0, 0, 2)), None

    return off_the_law({key: weight for key, (weight, _) in outcomes(program).items()}, tables[0])


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
