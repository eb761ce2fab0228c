# SPDX-License-Identifier: Apache-2.0
"""Drafts that pass a middle by leave the law alone, whatever their length depends on, as long as nobody drew them."""

from __future__ import annotations

import pytest
import torch
from enumeration import (
    CPU,
    EXACT,
    OneChoice,
    Opaque,
    TableModel,
    approximations,
    context_of,
    distance,
    outcomes,
    sampling,
    true_law,
)

from hf_polyspec.exactness.context import Context
from hf_polyspec.exactness.distributions import LawMaker
from hf_polyspec.exactness.proposal import Proposal
from hf_polyspec.levels import block as block_module
from hf_polyspec.levels.base import Drafter
from hf_polyspec.levels.causal_lm import CausalLMDrafter
from hf_polyspec.levels.emission import Emission
from hf_polyspec.levels.verifier import Verifier

UNSURE = 6
"""Seed of models whose drafter stops early often enough for its lengths to tell what was drawn."""


class Varying(Drafter):
    """Proposes none to three tokens that follow from the text alone, and so does their number."""

    def propose(self, context: Context, limits: list[int], law: LawMaker) -> Proposal:
        rows = zip(context.ids, limits, strict=True)
        tokens = [[(ids[-1] + i) % 2 for i in range(min(sum(ids) * 7 % 4, limit))] for ids, limit in rows]
        return Proposal(tokens, None, [[self.index] * len(row) for row in tokens])


def chain(
    tables: list[TableModel],
    drafter: Drafter,
    *,
    direct: int = 2,
    rule: str = "auto",
    block: int = 2,
    middle: type[Verifier] = Verifier,
) -> Verifier:
    """A target over middles, the lowest of which lets drafts of `direct` tokens pass."""
    level: Drafter = drafter
    for i, table in enumerate(reversed(tables[1:])):
        sizes = {"block_size": block, "direct_tokens": 0 if i else direct}
        level = OneChoice(middle(table, level, name="middle", rule=rule, **sizes))
    top = Verifier(tables[0], level, name="target", rule=rule)
    top.begin(0, 1, tables[0].vocabulary)
    return top


@pytest.mark.parametrize("rule", ["token", "block"])
@pytest.mark.parametrize("direct", [1, 2, 3])
@pytest.mark.parametrize("seed", [1, 2])
def test_three_models(rule: str, direct: int, seed: int) -> None:
    tables = approximations(2, 2, seed)
    assert distance(chain(tables, Varying(), direct=direct, rule=rule), tables[0], 5) < EXACT


@pytest.mark.parametrize("rule", ["token", "block"])
def test_four_models(rule: str) -> None:
    """The upper middle checks what passed the lower one by."""
    tables = approximations(3, 2, 5)
    assert distance(chain(tables, Varying(), rule=rule), tables[0], 4) < EXACT


def test_position_by_position() -> None:
    tables = approximations(2, 3, 9)
    assert distance(chain(tables, Varying()), tables[0], 3, sampling(Opaque())) < EXACT


@pytest.mark.parametrize("direct", [1, 2])
def test_what_was_drawn_is_checked_whatever_its_length(direct: int) -> None:
    tables = approximations(3, 2, UNSURE)
    small = CausalLMDrafter(tables[2], name="drafter", draft_tokens=3, confidence_threshold=0.45)
    assert distance(chain(tables[:2], OneChoice(small), direct=direct), tables[0], 4) < EXACT


def test_rows_go_their_own_ways() -> None:
    """One row's draft passes by while another's is checked: the joint law is the product of the target's laws."""
    tables = approximations(2, 2, 19)
    starts, length = ((1, 1), (1,)), 2
    middle = Verifier(tables[1], Varying(), name="middle", rule="token", block_size=1, direct_tokens=2)
    drafts = Varying().propose(context_of(*starts), [3, 3], LawMaker([], True, CPU)).tokens
    assert [len(row) for row in drafts] == [2, 3]
    top = Verifier(tables[0], OneChoice(middle), name="target", rule="token")
    top.begin(0, 2, 2)

    def program(replay: object) -> tuple[tuple[tuple[int, ...], ...], None]:
        rows: list[tuple[int, ...]] = [(), ()]
        while any(len(row) < length for row in rows):
            context = context_of(*(start + row for start, row in zip(starts, rows, strict=True)))
            emission = top.round(context, [length - len(row) for row in rows], LawMaker([], True, CPU, replay))
            rows = [row + tuple(more) for row, more in zip(rows, emission.tokens, strict=True)]
        return tuple(rows), None

    joint = outcomes(program)
    left, right = (true_law(tables[0], start, length) for start in starts)
    worst = max(abs(joint[(a, b)][0] - left[a] * right[b]) for a in left for b in right)
    assert worst < EXACT


# The mistakes.


def test_claiming_the_middles_law_for_what_it_did_not_draw_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    tables = approximations(2, 2, 1)

    def flat(tokens: torch.Tensor, columns: int) -> torch.Tensor:
        return torch.full((len(tokens), columns), 1 / columns)

    monkeypatch.setattr(block_module, "one_hot", flat)
    assert distance(chain(tables, Varying(), rule="token"), tables[0], 5) > 0.01


class PassesWhatWasDrawn(Verifier):
    """Lets long drafts pass by with the law they were drawn from; how long one is depends on what was drawn."""

    def _round_or_close(
        self, context: Context, limits: list[int], law: LawMaker, block: block_module.Block
    ) -> Emission | None:
        offered = self.source.propose(context, [limits[0] - 1], law)
        if len(offered.tokens[0]) < self.direct_tokens:
            return self._check(context, offered, [True], law, limits, 0.0)
        assert offered.q is not None
        block.add(0, offered.tokens[0], offered.origins[0], offered.q[0])
        block.unchecked[0] = 1
        return None


def test_drafts_that_were_drawn_and_pass_by_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    tables = approximations(3, 2, UNSURE)
    small = CausalLMDrafter(tables[2], name="drafter", draft_tokens=3, confidence_threshold=0.45)
    monkeypatch.setattr(block_module.Block, "_of_row", lambda block, row, like: torch.cat(block.laws[row]))
    assert distance(chain(tables[:2], OneChoice(small), middle=PassesWhatWasDrawn), tables[0], 4) > 0.01
