# SPDX-License-Identifier: Apache-2.0
"""Trees with drawn children: every outcome of every draw, total variation below 1e-9; what looks alike but is biased is
seen by the same harness."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from enumeration import (
    CPU,
    EXACT,
    START,
    OneChoice,
    OneChoiceRounds,
    Replay,
    TableModel,
    approximations,
    context_of,
    distance,
    outcomes,
    sampling,
    true_law,
)
from test_enumeration_trees import Continues, TreeTable

from hf_polyspec.context import Context
from hf_polyspec.distributions import LawMaker
from hf_polyspec.levels import drawn_tree, tree_judgement
from hf_polyspec.levels import joined as joined_module
from hf_polyspec.levels.base import Drafter, Proposal, TreeProposal
from hf_polyspec.levels.joined import JoinedDrafter
from hf_polyspec.levels.verifier import Verifier
from hf_polyspec.planning.agreement import Along, depth_ratios
from hf_polyspec.planning.readings import Reading, survival
from hf_polyspec.trees import ROOT, depths, graft, path_to


class Sketch(Drafter):
    """Gives every node of a level so many chosen children and, if told so, a drawn one, level by level.

    Args:
        table: whose likeliest ids are chosen, and what is drawn from.
        plan: per level, chosen children and whether one is drawn.
    """

    def __init__(self, table: TableModel, *plan: tuple[int, bool]) -> None:
        super().__init__()
        self.table, self.plan = table, plan

    def propose(self, context: Context, limits: list[int], law: LawMaker) -> Proposal:
        return Proposal([[]], None, [[]])

    def law_after(self, prefix: tuple[int, ...], chosen: list[int]) -> torch.Tensor:
        rest = self.table.law(prefix).clone()
        rest[chosen] = 0
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
                if draws:
                    laws.append(self.law_after(prefix, children))
                    drawn.append(len(tokens) + count)
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
    "plan", [((0, True),), ((1, True),), ((2, True),), ((0, True), (0, True)), ((1, False), (1, True))]
)
@pytest.mark.parametrize("seed", [1, 2])
def test_drawn_children_under_a_target(plan: tuple[tuple[int, bool], ...], seed: int) -> None:
    models = approximations(2, 3, seed, TreeTable)
    assert distance(two(models, Sketch(models[1], *plan)), models[0], 2) < EXACT


def test_a_deeper_tree_of_two_ids() -> None:
    models = approximations(2, 2, 3, TreeTable)
    assert distance(two(models, Sketch(models[1], (0, True), (0, True), (0, True))), models[0], 3) < EXACT


@pytest.mark.parametrize("rule", ["token", "block"])
@pytest.mark.parametrize(("vocabulary", "block_size", "plan"), [(3, 2, ((1, True),)), (2, 3, ((0, True), (0, True)))])
def test_drawn_children_under_a_middle_under_a_target(
    rule: str, vocabulary: int, block_size: int, plan: tuple[tuple[int, bool], ...]
) -> None:
    models = approximations(3, vocabulary, 4, TreeTable)
    middle = OneChoiceRounds(models[1], Sketch(models[2], *plan), name="middle", block_size=block_size, trees=True)
    top = Verifier(models[0], OneChoice(middle), name="target", rule=rule)
    top.begin(0, 1, vocabulary)
    assert distance(top, models[0], 3) < EXACT


def test_a_branch_beside_drawn_children(monkeypatch: pytest.MonkeyPatch) -> None:
    """The branch never shares a drawn node; sharing it, so that it counts as drawn only, is caught."""
    models = approximations(2, 3, 5, TreeTable)
    joined = JoinedDrafter(Sketch(models[1], (0, True)), Continues(3, 2))
    assert distance(two(models, joined), models[0], 2) < EXACT
    monkeypatch.setattr(joined_module, "graft", lambda tokens, parents, branch, besides: graft(tokens, parents, branch))
    assert distance(two(models, joined), models[0], 2) > 0.01


class Heads:
    """A table as a head: states are numbers of prefixes."""

    def __init__(self, table: TableModel, start: tuple[int, ...]) -> None:
        self.table, self.prefixes = table, [start]

    def guess(self, states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        laws = torch.stack([self.table.law(self.prefixes[int(state)]) for state in states[0, :, 0]])[None]
        sharper = laws**1.25
        return laws, sharper / sharper.sum(-1, keepdim=True)

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
            law.draw_ids,
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


@pytest.mark.parametrize(("total", "depth", "top_k"), [(1, 1, 1), (2, 1, 1), (2, 2, 1), (2, 2, 2), (3, 1, 2)])
def test_trees_that_grow_as_a_heads_do(total: int, depth: int, top_k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drawn_tree, "_drawn_chance", lambda mass: 0.8 * mass)
    models = approximations(2, 3, 7, TreeTable)
    drafter = Grows(models[1], total, depth, top_k)
    assert distance(two(models, drafter), models[0], 2) < EXACT
    assert max(drawn for _, drawn in drafter.seen) >= 1
    assert max(nodes for nodes, _ in drafter.seen) == total


def test_trees_that_grow_deep(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drawn_tree, "_drawn_chance", lambda mass: 1.2 * mass)
    models = approximations(2, 2, 7, TreeTable)
    drafter = Grows(models[1], 3, 3, 1)
    assert distance(two(models, drafter), models[0], 3) < EXACT
    assert max(drawn for _, drawn in drafter.seen) >= 2


def test_dropping_a_node_for_what_was_drawn_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drawn_tree, "_drawn_chance", lambda mass: 0.8 * mass)
    models = approximations(2, 3, 7, TreeTable)
    assert distance(two(models, Grows(models[1], 1, 1, 1, least=0.4)), models[0], 2) > 0.01


@pytest.mark.parametrize(("total", "depth"), [(1, 1), (2, 2), (3, 2), (4, 2)])
def test_a_replay_along_the_targets_texts_tells_what_is_accepted(
    total: int, depth: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Survival along a text, averaged over all texts, is the expected number of nodes that a real check keeps."""
    monkeypatch.setattr(drawn_tree, "_drawn_chance", lambda mass: 0.8 * mass)
    models = approximations(2, 3, 7, TreeTable)
    drafter, context, law = Grows(models[1], total, depth, 1), context_of(START), sampling()
    expected = 0.0
    for text, weight in true_law(models[0], START, depth + 1).items():
        laws = torch.stack([models[0].law(START + text[:i]) for i in range(len(text))])
        tree = drafter.propose_tree(context, [depth], Along(law, text))
        assert tree is not None
        ratios = depth_ratios(tree, Reading(laws, torch.tensor(text)), 0)
        expected += weight * float(survival(ratios[None, :depth], False).sum())
    real = 0.0

    def program(replay: Replay) -> tuple[Any, Any]:
        emission = two(models, drafter).round(context, [depth + 1], LawMaker([], True, CPU, replay))
        return emission.accepted[0], None

    for accepted, (probability, _) in outcomes(program).items():
        real += accepted * probability
    assert expected == pytest.approx(real, abs=1e-9)
    assert real > 0.1


class Unrestricted(Sketch):
    """Says that it drew from all ids although the chosen ones were left out."""

    def propose_tree(self, context: Context, limits: list[int], law: LawMaker) -> TreeProposal | None:
        tree = super().propose_tree(context, limits, law)
        if tree is None:
            return None
        whole = self.table.law(tuple(context.ids[0]))[None, None]
        return TreeProposal(tree.tokens, tree.parents, tree.origins, tree.drawn, whole)


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
    assert distance(two(models, Unrestricted(models[1], (1, True))), models[0], 2) > 0.01


def test_choosing_after_drawing_is_caught() -> None:
    models = approximations(2, 3, 1, TreeTable)
    assert distance(two(models, Besides(models[1])), models[0], 2) > 0.01


def test_judging_a_drawn_child_against_the_whole_law_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """p in place of p', the law without the chosen children."""
    monkeypatch.setattr(tree_judgement, "_chosen_beside", lambda tree: ([], [], []))
    models = approximations(2, 3, 1, TreeTable)
    assert distance(two(models, Sketch(models[1], (1, True))), models[0], 2) > 0.01


def test_keeping_the_first_draw_after_a_rejection_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """The token that was no chosen child, handed on in place of a draw from the residual."""
    genuine = tree_judgement.walk

    def walk(tokens: list[int], parents: list[int], drawn: list[int], trials: Any) -> tuple[list[int], int]:
        path, last = genuine(tokens, parents, drawn, trials)
        node = path[-1] if path else ROOT
        return path, drawn[node + 1] if node in trials and not trials[node].kept else last

    monkeypatch.setattr(tree_judgement, "walk", walk)
    models = approximations(2, 3, 1, TreeTable)
    assert distance(two(models, Sketch(models[1], (1, True))), models[0], 2) > 0.01
