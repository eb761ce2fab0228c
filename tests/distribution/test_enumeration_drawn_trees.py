# SPDX-License-Identifier: Apache-2.0
"""Trees with drawn children: every outcome of every draw, total variation below 1e-9; what looks alike but is biased is
seen by the same harness."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from enumeration import (
    EXACT,
    OneChoice,
    OneChoiceRounds,
    TableModel,
    approximations,
    distance,
)
from test_enumeration_trees import Continues, TreeTable

from hf_polyspec.exactness import tree_judgement
from hf_polyspec.exactness.context import Context
from hf_polyspec.exactness.distributions import LawMaker
from hf_polyspec.exactness.proposal import Proposal, TreeProposal
from hf_polyspec.exactness.tree_geometry import ROOT, depths, graft, path_to
from hf_polyspec.exactness.verification import Verdict, verify_tokens
from hf_polyspec.levels import drawn_tree
from hf_polyspec.levels import joined as joined_module
from hf_polyspec.levels.base import Drafter
from hf_polyspec.levels.joined import JoinedDrafter
from hf_polyspec.levels.verifier import Verifier


class Sketch(Drafter):
    """Gives every node of a level so many chosen children, and so many drawn without replacement, level by level.

    Args:
        table: whose likeliest ids are chosen, and what is drawn from.
        plan: per level, chosen and drawn children.
    """

    def __init__(self, table: TableModel, *plan: tuple[int, int]) -> None:
        super().__init__()
        self.table, self.plan = table, plan

    def propose(self, context: Context, limits: list[int], law: LawMaker) -> Proposal:
        return Proposal([[]], None, [[]])

    def law_after(self, prefix: tuple[int, ...], gone: list[int]) -> torch.Tensor:
        rest = self.table.law(prefix).clone()
        rest[gone] = 0
        return rest / rest.sum()

    def propose_tree(self, context: Context, limits: list[int], law: LawMaker) -> TreeProposal | None:
        if not limits[0]:
            return None
        tokens: list[int] = []
        parents: list[int] = []
        drawn, laws, front = [], [], [ROOT]
        for count, draws in self.plan[: limits[0]]:
            level = []
            for node in front:
                prefix = tuple(context.ids[0] + [tokens[n] for n in path_to(node, parents)])
                children = self.table.law(prefix).topk(count).indices.tolist()
                for _ in range(draws):
                    laws.append(self.law_after(prefix, children))
                    drawn.append(len(tokens) + len(children))
                    children.append(int(law.draw(laws[-1][None])[0]))
                level += range(len(tokens), len(tokens) + len(children))
                tokens += children
                parents += [node] * len(children)
            front = level
        assert max(depths(parents)) <= limits[0]
        q = torch.stack(laws)[None] if laws else None
        return TreeProposal([tokens], [parents], [[self.index] * len(tokens)], [drawn] if laws else [], q)


def two(models: list[TreeTable], drafter: Drafter) -> Verifier:
    top = Verifier(models[0], drafter, name="target", trees=True)
    top.begin(0, 1, models[0].vocabulary)
    return top


@pytest.mark.parametrize(
    "plan",
    [
        ((0, 1),),
        ((1, 1),),
        ((2, 1),),
        ((0, 2),),
        ((0, 3),),
        ((1, 2),),
        ((0, 1), (0, 1)),
        ((0, 2), (0, 1)),
        ((1, 0), (1, 1)),
    ],
)
@pytest.mark.parametrize("seed", [1, 2])
def test_drawn_children_under_a_target(plan: tuple[tuple[int, int], ...], seed: int) -> None:
    models = approximations(2, 3, seed, TreeTable)
    assert distance(two(models, Sketch(models[1], *plan)), models[0], 2) < EXACT


def test_a_deeper_tree_of_two_ids() -> None:
    models = approximations(2, 2, 3, TreeTable)
    assert distance(two(models, Sketch(models[1], (0, 1), (0, 1), (0, 1))), models[0], 3) < EXACT


@pytest.mark.parametrize("rule", ["token", "block"])
@pytest.mark.parametrize(
    ("vocabulary", "block_size", "plan"), [(3, 2, ((1, 1),)), (3, 2, ((0, 2),)), (2, 3, ((0, 1), (0, 1)))]
)
def test_drawn_children_under_a_middle_under_a_target(
    rule: str, vocabulary: int, block_size: int, plan: tuple[tuple[int, int], ...]
) -> None:
    models = approximations(3, vocabulary, 4, TreeTable)
    middle = OneChoiceRounds(models[1], Sketch(models[2], *plan), name="middle", block_size=block_size, trees=True)
    top = Verifier(models[0], OneChoice(middle), name="target", rule=rule)
    top.begin(0, 1, vocabulary)
    assert distance(top, models[0], 3) < EXACT


def test_a_branch_beside_drawn_children(monkeypatch: pytest.MonkeyPatch) -> None:
    """The branch never shares a drawn node; sharing it, so that it counts as drawn only, is caught."""
    models = approximations(2, 3, 5, TreeTable)
    joined = JoinedDrafter(Sketch(models[1], (0, 1)), Continues(3, 2))
    assert distance(two(models, joined), models[0], 2) < EXACT
    monkeypatch.setattr(joined_module, "graft", lambda tokens, parents, branch, besides: graft(tokens, parents, branch))
    assert distance(two(models, joined), models[0], 2) > 0.01


class Heads:
    """A table as a head: states are numbers of prefixes."""

    def __init__(self, table: TableModel, start: tuple[int, ...]) -> None:
        self.table, self.prefixes = table, [start]

    def guess(self, states: torch.Tensor) -> torch.Tensor:
        return torch.stack([self.table.law(self.prefixes[int(state)]) for state in states[0, :, 0]])[None]

    def step(self, tokens: torch.Tensor, features: torch.Tensor, level: int, sees: torch.Tensor) -> torch.Tensor:
        assert sees.shape[:2] == tokens.shape
        found = []
        for token, state in zip(tokens[0].tolist(), features[0, :, 0].tolist(), strict=True):
            self.prefixes.append((*self.prefixes[int(state)], token))
            found.append([float(len(self.prefixes) - 1)])
        return torch.tensor([found])


class Grows(Sketch):
    """What an EAGLE head does, with a table in place of the head; nodes drawn unlikely are dropped if told so."""

    def __init__(self, table: TableModel, total: int, depth: int, top_k: int, least: float = 0.0) -> None:
        super().__init__(table)
        self.sizes, self.least, self.seen = (total, depth, top_k), least, set()

    def propose_tree(self, context: Context, limits: list[int], law: LawMaker) -> TreeProposal | None:
        total, depth, top_k = self.sizes
        if not limits[0]:
            return None
        head, ids = Heads(self.table, tuple(context.ids[0])), torch.arange(self.table.vocabulary)
        grown, drawn = drawn_tree.grow_drawn(
            torch.zeros(1, 1, 1),
            [min(depth, limits[0])],
            [total],
            head.guess,
            ids,
            head.step,
            law.draw_distinct,
            top_k=top_k,
        )
        (tokens,), (parents,), (nodes,) = grown.tokens, grown.parents, drawn.nodes
        assert len(tokens) <= total
        assert max(depths(parents)) <= min(depth, limits[0])
        self.seen.add((len(tokens), len(nodes)))
        laws = drawn.laws
        if self.least:
            kept = [place for place, node in enumerate(nodes) if laws[0, place, tokens[node]] >= self.least]
            gone = {node for place, node in enumerate(nodes) if place not in kept}
            if not gone & set(parents):
                number = {ROOT: ROOT} | {n: i for i, n in enumerate(n for n in range(len(tokens)) if n not in gone)}
                nodes, laws = [number[nodes[place]] for place in kept], laws[:, kept]
                parents = [number[p] for n, p in enumerate(parents) if n not in gone]
                tokens = [t for n, t in enumerate(tokens) if n not in gone]
        return TreeProposal([tokens], [parents], [[self.index] * len(tokens)], [nodes], laws)


@pytest.mark.parametrize(
    ("vocabulary", "total", "depth", "top_k"),
    [(3, 1, 1, 1), (3, 2, 1, 2), (3, 2, 2, 1), (3, 2, 2, 2), (3, 3, 1, 3), (2, 3, 2, 2), (2, 3, 3, 1)],
)
def test_trees_that_grow_as_a_heads_do(vocabulary: int, total: int, depth: int, top_k: int) -> None:
    models = approximations(2, vocabulary, 7, TreeTable)
    drafter = Grows(models[1], total, depth, top_k)
    assert distance(two(models, drafter), models[0], 1 + depth) < EXACT
    assert max(nodes for nodes, _ in drafter.seen) == total
    assert all(nodes == drawn for nodes, drawn in drafter.seen)


def test_dropping_a_node_for_what_was_drawn_is_caught() -> None:
    models = approximations(2, 3, 7, TreeTable)
    assert distance(two(models, Grows(models[1], 1, 1, 1, least=0.4)), models[0], 2) > 0.01


class Unrestricted(Sketch):
    """Says that it drew from all ids although the chosen ones were left out."""

    def propose_tree(self, context: Context, limits: list[int], law: LawMaker) -> TreeProposal | None:
        tree = super().propose_tree(context, limits, law)
        if tree is None:
            return None
        whole = self.table.law(tuple(context.ids[0]))[None, None]
        return dataclasses.replace(tree, q=whole)


class Besides(Sketch):
    """Draws first, then chooses the likeliest id that was not drawn."""

    def propose_tree(self, context: Context, limits: list[int], law: LawMaker) -> TreeProposal | None:
        if not limits[0]:
            return None
        q = self.table.law(tuple(context.ids[0]))
        drawn = int(law.draw(q[None])[0])
        other = next(token for token in q.topk(2).indices.tolist() if token != drawn)
        return TreeProposal([[other, drawn]], [[ROOT, ROOT]], [[self.index] * 2], [[1]], q[None, None])


def test_another_law_than_was_drawn_from_is_caught() -> None:
    models = approximations(2, 3, 1, TreeTable)
    assert distance(two(models, Unrestricted(models[1], (1, 1))), models[0], 2) > 0.01


def test_choosing_after_drawing_is_caught() -> None:
    models = approximations(2, 3, 1, TreeTable)
    assert distance(two(models, Besides(models[1])), models[0], 2) > 0.01


def test_judging_a_drawn_child_against_the_whole_law_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """p in place of p', the law without the chosen children."""
    genuine = tree_judgement._try_drawn

    def whole(law: Any, tree: Any, p: Any, children: Any, at: Any) -> Any:
        return genuine(law, tree, p, [dataclasses.replace(row, chosen={}) for row in children], at)

    monkeypatch.setattr(tree_judgement, "_try_drawn", whole)
    models = approximations(2, 3, 1, TreeTable)
    assert distance(two(models, Sketch(models[1], (1, 1))), models[0], 2) > 0.01


def test_keeping_the_first_draw_after_a_rejection_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """A token from the law as it was before a child was rejected, in place of a draw from the residual."""
    monkeypatch.setattr(tree_judgement, "verify_tokens", forgetful)
    models = approximations(2, 3, 1, TreeTable)
    assert distance(two(models, Sketch(models[1], (1, 1))), models[0], 2) > 0.01
    assert distance(two(models, Sketch(models[1], (0, 2))), models[0], 2) > 0.01


def forgetful(tokens: torch.Tensor, lengths: torch.Tensor, p: torch.Tensor, q: Any, randomness: Any) -> Verdict:
    """Speculative sampling that goes on with the law it began with."""
    return dataclasses.replace(verify_tokens(tokens, lengths, p, q, randomness), following=p[:, 0])


class Replacing(Sketch):
    """Says that it drew without replacement, but draws every child from the whole law."""

    def propose_tree(self, context: Context, limits: list[int], law: LawMaker) -> TreeProposal | None:
        tree = super().propose_tree(context, limits, law)
        if tree is None:
            return None
        whole = self.table.law(tuple(context.ids[0]))
        tree.tokens[0][1] = int(law.draw(whole[None])[0])
        return tree


def test_drawing_with_replacement_under_the_laws_of_without_is_caught() -> None:
    models = approximations(2, 3, 1, TreeTable)
    assert distance(two(models, Replacing(models[1], (0, 2))), models[0], 2) > 0.01
