# SPDX-License-Identifier: Apache-2.0
"""Levels that share plain generation's noise emit the target's law exactly, with the noise integrated out.

Over two ids a level's pick at a step depends on one number, r = e_1 / e_0: it is 1 where p_1 / p_0 > r, and r is below
c with probability c / (1 + c). The odds of all levels after all texts of a step's length cut the line into intervals
inside of which nobody's pick changes. So the real levels, run once for each choice of an interval a step, are run over
every noise there is; laws are float64, and sums exact to about 1e-15.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from enumeration import CPU, EXACT, START, Opaque, TableModel, approximations, context_of, total_variation, true_law
from test_enumeration_trees import TreeTable

from hf_polyspec.exactness.context import Context
from hf_polyspec.exactness.distributions import LawMaker
from hf_polyspec.exactness.noise import Noise
from hf_polyspec.exactness.proposal import Proposal, TreeProposal
from hf_polyspec.levels.base import Drafter
from hf_polyspec.levels.causal_lm import CausalLMDrafter
from hf_polyspec.levels.verifier import Verifier

LENGTH = 4


class Given(Noise):
    """Noise that a test has chosen: r = e_1 / e_0 of every step, and of a few beyond."""

    dtype = torch.float64

    def __init__(self, ratios: Sequence[float]) -> None:
        self.ratios = [*ratios, *([1.0] * 4)]

    def at(self, rows: Sequence[int], steps: Sequence[Sequence[int]]) -> list[list[torch.Tensor]]:
        return [[torch.tensor([1.0, self.ratios[step]], dtype=self.dtype) for step in wanted] for wanted in steps]


def every_noise(tables: Sequence[TableModel], length: int) -> Any:
    """All choices of an interval a step: (ratios, probability)."""
    steps = []
    for step in range(length):
        odds = {
            float(table.law(START + text)[1] / table.law(START + text)[0])
            for table in tables
            for text in itertools.product((0, 1), repeat=step)
        }
        bounds = [0.0, *sorted(odds), float("inf")]
        # between two bounds, and in the last interval anywhere beyond
        inside = [(low + high) / 2 if high < float("inf") else low + 1 for low, high in itertools.pairwise(bounds)]
        below = [1.0 if bound == float("inf") else bound / (1 + bound) for bound in bounds]
        chances = [high - low for low, high in itertools.pairwise(below)]
        steps.append(list(zip(inside, chances, strict=True)))
    for choice in itertools.product(*steps):
        weight = 1.0
        for _, chance in choice:
            weight *= chance
        yield [ratio for ratio, _ in choice], weight


def written(top: Verifier, law: LawMaker, length: int) -> tuple[tuple[int, ...], int]:
    """What a chain writes under one noise, and in how many rounds."""
    tokens: list[int] = []
    rounds = 0
    while len(tokens) < length:
        tokens += top.round(context_of(START + tuple(tokens)), [length - len(tokens)], law).tokens[0]
        rounds += 1
    return tuple(tokens), rounds


def emitted(
    top: Verifier, tables: Sequence[TableModel], length: int, kind: type[Given] = Given, *processors: Any
) -> Any:
    """The law of what a chain writes, and its mean number of rounds."""
    found: dict[tuple[int, ...], float] = {}
    total = 0.0
    for ratios, weight in every_noise(tables, length):
        text, rounds = written(top, LawMaker(list(processors), True, CPU, noise=kind(ratios)), length)
        found[text] = found.get(text, 0.0) + weight
        total += weight * rounds
    assert sum(found.values()) == pytest.approx(1, abs=1e-12)
    return found, total


def chain(tables: Sequence[TableModel], drafter: Drafter | None = None, block_size: int = 2) -> Verifier:
    level = drafter or CausalLMDrafter(tables[-1], name="drafter", draft_tokens=2)
    for table in reversed(tables[1 : len(tables) if drafter else -1]):
        level = Verifier(table, level, name="middle", block_size=block_size)
    top = Verifier(tables[0], level, name="target", trees=True)
    top.begin(0, 1, 2)
    return top


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("seed", [1, 2])
def test_chains(count: int, seed: int) -> None:
    length = LENGTH if count == 2 else 3
    tables = approximations(count, 2, seed)
    law, rounds = emitted(chain(tables), tables, length)
    assert total_variation(law, true_law(tables[0], START, length)) < EXACT
    assert rounds < 0.8 * length, "drafts took part"


def test_position_by_position_for_processors_with_state() -> None:
    tables = approximations(3, 2, 3)
    law, _ = emitted(chain(tables), tables, 3, Given, Opaque())
    assert total_variation(law, true_law(tables[0], START, 3)) < EXACT


class Fixed(Drafter):
    """Offers the same two tokens always, or the same tree: nobody drew them."""

    shares_noise = True

    def __init__(self, tree: bool) -> None:
        super().__init__()
        self.tree = tree

    def propose(self, context: Context, limits: list[int], law: LawMaker) -> Proposal:
        return Proposal([[0, 1][: limits[0]]], None, [[1, 1][: limits[0]]])

    def propose_tree(self, context: Context, limits: list[int], law: LawMaker) -> TreeProposal | None:
        if not self.tree or limits[0] < 2:
            return None
        return TreeProposal([[0, 1, 1, 0]], [[-1, -1, 0, 1]], [[1, 1, 1, 1]])


@pytest.mark.parametrize("tree", [False, True])
def test_what_nobody_drew(tree: bool) -> None:
    tables = approximations(1, 2, 5, TreeTable)
    law, rounds = emitted(chain(tables, Fixed(tree)), tables, LENGTH)
    assert total_variation(law, true_law(tables[0], START, LENGTH)) < EXACT
    assert rounds < LENGTH


def test_acceptance_is_what_theory_says() -> None:
    """The first draft of a chain of two, over all noise: sum over x of 1 / sum over y of max(p_y / p_x, q_y / q_x)."""
    from hf_polyspec.planning.theory.coupling import coupled_acceptance

    for seed in (1, 2, 3):
        tables = approximations(2, 2, seed)
        same = 0.0
        for ratios, weight in every_noise(tables, 1):
            law = LawMaker([], True, CPU, noise=Given(ratios))
            emission = chain(tables).round(context_of(START), [2], law)
            same += weight * emission.accepted[0]
        p, q = (table.law(START) for table in tables)
        assert same == pytest.approx(float(coupled_acceptance(p, q)), abs=1e-12)


class Again(Given):
    """Wrong: one noise for all steps."""

    def at(self, rows: Sequence[int], steps: Sequence[Sequence[int]]) -> list[list[torch.Tensor]]:
        return super().at(rows, [[0] * len(wanted) for wanted in steps])


class Late(Given):
    """Wrong: every second step reads the noise of the step before it."""

    def at(self, rows: Sequence[int], steps: Sequence[Sequence[int]]) -> list[list[torch.Tensor]]:
        return super().at(rows, [[step - step % 2 for step in wanted] for wanted in steps])


@pytest.mark.parametrize("wrong", [Again, Late])
def test_noise_that_is_used_twice_is_caught(wrong: type[Given]) -> None:
    tables = approximations(2, 2, 1)
    law, _ = emitted(chain(tables), tables, 3, wrong)
    assert total_variation(law, true_law(tables[0], START, 3)) > 0.01


def test_keeping_what_the_target_would_not_have_picked_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """A verifier that takes a draft where its own law likes it well enough, as lossy rules do."""
    from hf_polyspec.exactness import judgement

    genuine = judgement._compared

    def lenient(law: LawMaker, context: Context, proposal: Proposal, scores: torch.Tensor, *given: Any) -> Any:
        found = genuine(law, context, proposal, scores, *given)
        if proposal.tokens[0] and not found.accepted[0] and scores.softmax(-1)[0, 0, proposal.tokens[0][0]] > 0.3:
            return judgement.Judgement([1], [proposal.tokens[0][:1]], scores, None)
        return found

    monkeypatch.setattr(judgement, "_compared", lenient)
    tables = approximations(2, 2, 1)
    law, _ = emitted(chain(tables), tables, 3)
    assert total_variation(law, true_law(tables[0], START, 3)) > 0.01
