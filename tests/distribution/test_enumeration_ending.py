# SPDX-License-Identifier: Apache-2.0
"""Blocks that end by a rule leave the law alone, as long as it looks at what is held and at what nobody drew."""

from __future__ import annotations

import pytest
from enumeration import (
    EXACT,
    START,
    OneChoice,
    Opaque,
    TableModel,
    approximations,
    distance,
    sampling,
    total_variation,
    true_law,
)
from test_enumeration_coupled import emitted
from test_enumeration_direct import UNSURE, Varying

from hf_polyspec.control import Costs
from hf_polyspec.control.costs import Head
from hf_polyspec.control.ending import WorthEnding
from hf_polyspec.exactness.proposal import Proposal
from hf_polyspec.levels.base import Drafter
from hf_polyspec.levels.causal_lm import CausalLMDrafter
from hf_polyspec.levels.ending import Ending
from hf_polyspec.levels.verifier import Verifier


class Unsure(Ending):
    """Ends behind a token that was unlikely by the law it was drawn from, or by the texts that are held, with what is
    offered behind it: all of it, or what the held tokens say."""

    def __init__(self, level: Verifier) -> None:
        self.level = level

    def choose(self, source: Drafter, held: int, offered: Proposal) -> tuple[bool, Proposal]:
        tokens, laws = self.level._block.tokens[0], self.level._block.laws[0]
        sure = float(laws[-1][-1, tokens[-1]]) if laws else 1.0
        ends = held > 3 or sure < 0.55 or (held > 0 and sum(tokens) % 3 == 2)
        if not ends:
            return False, offered
        return True, offered.cut([0 if offered.q is not None else offered.width - sum(tokens) % 2 * (held > 1)])

    def add(self, tokens: int, leads: object) -> None:
        """Nobody compares choices where levels draw."""


class Peeking(Unsure):
    """Goes on or not by the value of what was drawn, and leaves it out."""

    def choose(self, source: Drafter, held: int, offered: Proposal) -> tuple[bool, Proposal]:
        ends = held > 1 or (bool(offered.tokens[0]) and offered.tokens[0][0] == 0)
        return ends, offered.cut([0]) if ends else offered


class Dropping(Unsure):
    """Ends before the unsure token that was held last, instead of behind it."""

    def choose(self, source: Drafter, held: int, offered: Proposal) -> tuple[bool, Proposal]:
        block = self.level._block
        if held > 0 and block.tokens[0][-1] == 0:
            block.tokens[0].pop()
            block.origins[0].pop()
            if block.laws[0]:
                block.laws[0][-1] = block.laws[0][-1][:-1]
            return True, offered.cut([0])
        return held > 1, offered.cut([0]) if held > 1 else offered


def drawing(table: TableModel, threshold: float = 0.0) -> Drafter:
    return CausalLMDrafter(table, name="drafter", draft_tokens=3, confidence_threshold=threshold)


def middle_of(table: TableModel, below: Drafter, ending: type[Unsure], rule: str = "auto") -> Verifier:
    middle = Verifier(table, below, name="middle", rule=rule)
    middle.ending = ending(middle)
    return middle


def over(table: TableModel, below: Drafter, rule: str = "auto") -> Verifier:
    top = Verifier(table, below, name="target", rule=rule)
    top.begin(0, 1, table.vocabulary)
    return top


@pytest.mark.parametrize("rule", ["token", "block"])
@pytest.mark.parametrize("seed", [1, 2])
def test_a_rule_that_looks_at_what_is_held(rule: str, seed: int) -> None:
    """Behind the block, or checked, stand drafts that nobody drew."""
    tables = approximations(2, 2, seed)
    top = over(tables[0], OneChoice(middle_of(tables[1], Varying(), Unsure, rule)), rule)
    assert distance(top, tables[0], 5) < EXACT


@pytest.mark.parametrize("rule", ["token", "block"])
def test_over_drafts_that_were_drawn(rule: str) -> None:
    """They are checked, or left out before anybody looked at them."""
    tables = approximations(3, 2, UNSURE)
    below = middle_of(tables[1], OneChoice(drawing(tables[2], 0.45)), Unsure, rule)
    assert distance(over(tables[0], OneChoice(below), rule), tables[0], 4) < EXACT


def test_position_by_position() -> None:
    tables = approximations(2, 2, 9)
    top = over(tables[0], OneChoice(middle_of(tables[1], Varying(), Unsure)))
    assert distance(top, tables[0], 4, sampling(Opaque())) < EXACT


@pytest.mark.parametrize("rule", ["token", "block"])
def test_what_a_block_is_worth_does_not_follow_from_what_was_drawn(rule: str) -> None:
    """A drafter that stops where it is unsure says by the length of a draft what it has drawn."""
    tables = approximations(3, 2, UNSURE)
    below = Verifier(tables[1], OneChoice(drawing(tables[2], 0.45)), name="middle", rule=rule, block_size=3)
    # by which a draft of one token would not be worth the middle's pass, and one of two or three is
    below.ending = WorthEnding(below, Costs([[[1, 1.0], [16, 1.4]], [[1, 2.2], [16, 2.3]]], 0.95, Head(0.9, 2.0)))
    assert distance(over(tables[0], OneChoice(below), rule), tables[0], 4) < EXACT


# The mistakes.


@pytest.mark.parametrize("wrong", [Peeking, Dropping])
def test_a_rule_that_looks_at_a_draw_is_caught(wrong: type[Unsure]) -> None:
    tables = approximations(3, 2, 7)
    below = middle_of(tables[1], OneChoice(drawing(tables[2])), wrong, "token")
    assert distance(over(tables[0], OneChoice(below), "token"), tables[0], 4) > 0.01


@pytest.mark.parametrize("rule", [Unsure, Peeking, Dropping])
def test_under_shared_noise_no_rule_changes_the_text(rule: type[Unsure]) -> None:
    tables = approximations(3, 2, 1)
    top = over(tables[0], middle_of(tables[1], drawing(tables[2]), rule))
    law, _ = emitted(top, tables, 3)
    assert total_variation(law, true_law(tables[0], START, 3)) < EXACT
