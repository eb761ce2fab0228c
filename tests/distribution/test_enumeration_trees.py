# SPDX-License-Identifier: Apache-2.0
"""Trees under a target, and under a middle under a target: every outcome of every draw, total variation below 1e-9.

The wrong rules are those published code has used; the same harness must see each of them.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from enumeration import (
    CPU,
    EXACT,
    START,
    OneChoice,
    OneChoiceRounds,
    TableModel,
    approximations,
    distance,
    emitted_law,
    sampling,
    total_variation,
    true_law,
)
from transformers.generation.logits_process import RepetitionPenaltyLogitsProcessor

from hf_polyspec.exactness.context import Context
from hf_polyspec.exactness.distributions import LawMaker
from hf_polyspec.exactness.passes import Pass
from hf_polyspec.exactness.proposal import Proposal, TreeProposal
from hf_polyspec.exactness.tree_geometry import ROOT, depths, path_to
from hf_polyspec.exactness.tree_judgement import TreeJudgement
from hf_polyspec.levels import joined as joined_module
from hf_polyspec.levels import verifier as verifier_module
from hf_polyspec.levels.base import Drafter
from hf_polyspec.levels.joined import JoinedDrafter
from hf_polyspec.levels.verifier import Verifier


class TreeTable(TableModel):
    """A table model that reads trees."""

    def run_tree(self, context: Context, tree: TreeProposal, stats: Any) -> Pass:
        (ids,), (tokens,), (parents,) = context.ids, tree.tokens, tree.parents
        paths = [[tokens[n] for n in path_to(node, parents)] for node in (ROOT, *range(len(tokens)))]
        logits = torch.stack([self.logits(tuple(ids + path)) for path in paths])
        return Pass(logits[None], None, 1 + len(tokens))

    def keep_paths(self, passed: Pass, context: Context, tree: TreeProposal, paths: list[list[int]]) -> Pass:
        return passed


@dataclass(frozen=True)
class DrawnTree(TreeProposal):
    """A tree that says how its first nodes came about, for the rules that need to know."""

    root_law: torch.Tensor | None = None


class Grower(Drafter):
    """The likeliest children of the likeliest nodes of a table, as an EAGLE head would."""

    def __init__(self, table: TableModel, branches: tuple[int, ...] = (2, 1)) -> None:
        super().__init__()
        self.table = table
        self.branches = branches

    def propose(self, context: Context, limits: list[int], law: LawMaker) -> Proposal:
        return Proposal([[]], None, [[]])

    def propose_tree(self, context: Context, limits: list[int], law: LawMaker) -> TreeProposal | None:
        if not limits[0]:
            return None
        tokens: list[int] = []
        parents: list[int] = []
        front = [ROOT]
        for branch in self.branches[: limits[0]]:
            level = []
            for node in front:
                prefix = tuple(context.ids[0] + [tokens[n] for n in path_to(node, parents)])
                for token in self.table.law(prefix).topk(branch).indices.tolist():
                    level.append(len(tokens))
                    tokens.append(token)
                    parents.append(node)
            front = level
        assert max(depths(parents)) <= limits[0]
        q = self.table.law(tuple(context.ids[0]))
        return DrawnTree([tokens], [parents], [[self.index] * len(tokens)], [], None, q)


def two(models: list[TreeTable], drafter: Drafter) -> Verifier:
    top = Verifier(models[0], drafter, name="target", trees=True)
    top.begin(0, 1, models[0].vocabulary)
    return top


def three(models: list[TreeTable], drafter: Drafter, rule: str, block_size: int) -> Verifier:
    middle = OneChoiceRounds(models[1], drafter, name="middle", block_size=block_size, trees=True)
    top = Verifier(models[0], OneChoice(middle), name="target", rule=rule)
    top.begin(0, 1, models[0].vocabulary)
    return top


@pytest.mark.parametrize("branches", [(1,), (2,), (3,), (2, 1), (1, 1, 1), (1, 2)])
@pytest.mark.parametrize("seed", [1, 2])
def test_a_tree_under_a_target(branches: tuple[int, ...], seed: int) -> None:
    models = approximations(2, 3, seed, TreeTable)
    assert distance(two(models, Grower(models[1], branches)), models[0], 3) < EXACT


@pytest.mark.parametrize("rule", ["token", "block"])
@pytest.mark.parametrize(("vocabulary", "block_size", "branches"), [(3, 2, (2,)), (2, 3, (2, 1)), (3, 2, (1, 1))])
def test_a_tree_under_a_middle_under_a_target(
    rule: str, vocabulary: int, block_size: int, branches: tuple[int, ...]
) -> None:
    models = approximations(3, vocabulary, 4, TreeTable)
    assert distance(three(models, Grower(models[2], branches), rule, block_size), models[0], 3) < EXACT


class Continues(Drafter):
    """A branch beside the tree: a chain that the ids before it determine, or one drawn from a table."""

    def __init__(self, vocabulary: int, length: int, table: TableModel | None = None) -> None:
        super().__init__()
        self.vocabulary, self.length, self.table = vocabulary, length, table

    def propose(self, context: Context, limits: list[int], law: LawMaker) -> Proposal:
        ids = list(context.ids[0])
        count = min(self.length, limits[0])
        for i in range(count):
            q = None if self.table is None else self.table.law(tuple(ids))
            ids.append((sum(ids) + i) % self.vocabulary if q is None else int(law.draw(q[None])[0]))
        tokens = ids[len(ids) - count :]
        return Proposal([tokens], None, [[self.index] * count])


@pytest.mark.parametrize("drawn", [False, True])
@pytest.mark.parametrize(("vocabulary", "branches"), [(3, (1,)), (2, (1, 1))])
def test_a_tree_with_a_branch_under_a_target(vocabulary: int, branches: tuple[int, ...], drawn: bool) -> None:
    models = approximations(2, vocabulary, 5, TreeTable)
    branch = Continues(vocabulary, 2, models[1] if drawn else None)
    assert distance(two(models, JoinedDrafter(Grower(models[1], branches), branch)), models[0], 3) < EXACT


@pytest.mark.parametrize(("vocabulary", "block_size", "branches"), [(3, 2, (1,)), (2, 3, (1, 1))])
def test_a_tree_with_a_branch_under_a_middle_under_a_target(
    vocabulary: int, block_size: int, branches: tuple[int, ...]
) -> None:
    models = approximations(3, vocabulary, 4, TreeTable)
    joined = JoinedDrafter(Grower(models[2], branches), Continues(vocabulary, 2))
    assert distance(three(models, joined, "auto", block_size), models[0], 3) < EXACT


class Draws(Drafter):
    """A chain drawn from a table, which ends after token 0; one shorter than `least` is kept back if told so."""

    def __init__(self, table: TableModel, length: int, least: int = 0) -> None:
        super().__init__()
        self.table, self.length, self.least = table, length, least

    def propose(self, context: Context, limits: list[int], law: LawMaker) -> Proposal:
        ids, laws = list(context.ids[0]), []
        while len(laws) < min(self.length, limits[0]) and not (laws and ids[-1] == 0):
            laws.append(self.table.law(tuple(ids)))
            ids.append(int(law.draw(laws[-1][None])[0]))
        if len(laws) < self.least or not laws:
            return Proposal([[]], None, [[]])
        return Proposal([ids[-len(laws) :]], torch.stack(laws)[None], [[self.index] * len(laws)])


@pytest.mark.parametrize("vocabulary", [2, 3])
def test_chains_of_two_drafters_that_draw(vocabulary: int) -> None:
    """A short chain that was drawn is used all the same; keeping it back for its length is caught."""
    models = approximations(3, vocabulary, 9, TreeTable)
    head = Draws(models[2], 1)
    assert distance(two(models, JoinedDrafter(head, Draws(models[1], 2), chain_tokens=2)), models[0], 3) < EXACT
    kept_back = JoinedDrafter(head, Draws(models[1], 2, least=2), chain_tokens=2)
    assert distance(two(models, kept_back), models[0], 3) > 0.003


def test_doubled_siblings_are_no_way_to_join(monkeypatch: pytest.MonkeyPatch) -> None:
    """A chain appended as it is doubles nodes; judging each child of a node by a coin of its own then shows."""

    def coins(
        law: LawMaker, context: Context, tree: TreeProposal, logits: torch.Tensor, active: list[bool]
    ) -> TreeJudgement:
        p = logits[0, 0].softmax(-1)
        rest, path = p.clone(), []
        for node, (token, parent) in enumerate(zip(tree.tokens[0], tree.parents[0], strict=True)):
            if parent == ROOT and bool(law.randomness.bernoulli(p[token][None])[0]):
                path = [node]
                break
            rest[token] = 0
        after = logits[0, path[0] + 1].softmax(-1) if path else rest
        tokens = [*(tree.tokens[0][node] for node in path), int(law.draw(after[None])[0])]
        emitted = logits[:, : len(tokens)]
        return TreeJudgement([path], [tokens], emitted, emitted, emitted.softmax(-1), [{}])

    monkeypatch.setattr(verifier_module, "judge_tree", coins)
    models = approximations(2, 4, 3, TreeTable)
    doubled = JoinedDrafter(Grower(models[1], (2,)), Continues(4, 1))
    monkeypatch.setattr(joined_module, "graft", lambda tokens, parents, branch, besides: (branch, [ROOT] * len(branch)))
    assert distance(two(models, doubled), models[0], 2) > 0.01


def test_processors_see_each_nodes_own_path() -> None:
    models = approximations(2, 3, 6, TreeTable)
    law = sampling(RepetitionPenaltyLogitsProcessor(1.7))
    emitted = emitted_law(two(models, Grower(models[1], (2, 1))), law, START, 3)
    expected: dict[tuple[int, ...], float] = {(): 1.0}
    for _ in range(3):
        longer = {}
        for tokens, weight in expected.items():
            prefix = START + tokens
            scores = law.scores_at(torch.tensor([prefix]), models[0].logits(prefix)[None])[0]
            for token, probability in enumerate(scores.softmax(-1).tolist()):
                longer[(*tokens, token)] = weight * probability
        expected = longer
    assert total_variation(emitted, expected) < EXACT
    assert total_variation(emitted, true_law(models[0], START, 3)) > 0.01


class DrawsChildren(Grower):
    """Two children drawn from q without replacement; those it was unsure of are left out if `least` says so."""

    def __init__(self, table: TableModel, least: float) -> None:
        super().__init__(table)
        self.least = least

    def propose_tree(self, context: Context, limits: list[int], law: LawMaker) -> TreeProposal | None:
        if not limits[0]:
            return None
        q = self.table.law(tuple(context.ids[0]))
        left, tokens = q.clone(), []
        for _ in range(2):
            token = int(law.draw(left[None])[0])
            left[token] = 0
            tokens.append(token)
        kept = [token for token in tokens if q[token] >= self.least]
        return DrawnTree([kept], [[ROOT] * len(kept)], [[self.index] * len(kept)], [], None, q)


def ratio_rule(*, only_zeroes: bool) -> Any:
    """Children accepted with min(1, p/q); after a rejection max(p - q, 0), or p with only that child zeroed."""

    def judge(
        law: LawMaker, context: Context, tree: DrawnTree, logits: torch.Tensor, active: list[bool]
    ) -> TreeJudgement:
        p, q = logits[0, 0].softmax(-1), tree.root_law.clone()
        path: list[int] = []
        for node, token in enumerate(tree.tokens[0]):
            if bool(law.randomness.bernoulli((p[token] / q[token]).clamp(max=1)[None])[0]):
                path = [node]
                break
            residual = p.clone() if only_zeroes else (p - q).clamp(min=0)
            residual[token] = 0
            p = residual / residual.sum()
            q[token] = 0
            q = q / q.sum()
        after = logits[0, path[0] + 1].softmax(-1) if path else p
        token = int(law.draw(after[None])[0])
        tokens = [*(tree.tokens[0][node] for node in path), token]
        emitted = logits[:, : len(tokens)]
        return TreeJudgement([path], [tokens], emitted, emitted, emitted.softmax(-1), [{}])

    return judge


def wrong(monkeypatch: pytest.MonkeyPatch, judge: Any, drafter: type[Grower], *arguments: Any) -> float:
    monkeypatch.setattr(verifier_module, "judge_tree", judge)
    models = approximations(2, 4, 3, TreeTable)
    return distance(two(models, drafter(models[1], *arguments)), models[0], 2)


def test_the_mixed_residual_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    assert wrong(monkeypatch, ratio_rule(only_zeroes=True), DrawsChildren, 0.0) > 0.01


def test_ratios_on_chosen_children_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    assert wrong(monkeypatch, ratio_rule(only_zeroes=False), Grower, (2,)) > 0.01


def test_pruning_drawn_children_by_confidence_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    assert wrong(monkeypatch, ratio_rule(only_zeroes=False), DrawsChildren, 0.25) > 0.01


def test_the_ratio_rule_itself_is_right(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the wrong variants are variants of: without pruning, and with the whole residual, it is exact."""
    assert wrong(monkeypatch, ratio_rule(only_zeroes=False), DrawsChildren, 0.0) < EXACT


def test_pruning_does_no_harm_under_the_one_hot_rule() -> None:
    models = approximations(2, 4, 3, TreeTable)
    assert distance(two(models, DrawsChildren(models[1], 0.25)), models[0], 2) < EXACT


def test_greedy_trees_follow_the_argmax() -> None:
    models = approximations(2, 3, 8, TreeTable)
    law = LawMaker([], False, CPU)
    for branches in itertools.product((1, 2, 3), repeat=2):
        emitted = emitted_law(two(models, Grower(models[1], branches)), law, START, 3)
        text = START
        for _ in range(3):
            text = (*text, int(models[0].logits(text).argmax()))
        assert emitted == {text[1:]: 1.0}
