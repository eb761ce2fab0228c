# SPDX-License-Identifier: Apache-2.0
"""From one forward pass over a tree to what a verifier emits.

Children that were chosen, not drawn, are judged by the one-hot rule: draw y from p at a node; if y is a child, go
there, else y is the token after the path. However they were chosen, every emitted token is a draw from p.

Where one more child was drawn from a law r, a y that is no chosen child is replaced: the drawn child is judged by
speculative sampling against p', which is p without the chosen children, and a rejection continues with max(p' - r, 0).
Given that y is no chosen child it follows p', and so does what replaces it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from ..context import Context
from ..distributions import LawMaker
from ..telemetry import LevelStats
from ..trees import ROOT, depths, path_to
from ..verification import overlap, verify_tokens
from .base import TreeProposal


@dataclass(frozen=True)
class TreeJudgement:
    """What a verifier makes of a tree.

    Attributes:
        paths: per row, the nodes kept, from the context on.
        tokens: per row, their tokens and the one drawn after them; empty for rows that were not asked.
        logits, scores: `[B, E, V]` raw and processed, of the emitted positions.
        p: `[B, E, V]` the law each emitted token follows; None in the greedy limit.
        chances: per row, by parent, how likely it was that its drawn child is kept.
    """

    paths: list[list[int]]
    tokens: list[list[int]]
    logits: torch.Tensor
    scores: torch.Tensor
    p: torch.Tensor | None
    chances: list[dict[int, float]] = field(default_factory=list)


@dataclass(frozen=True)
class Trial:
    """What became of a drawn child, should no chosen one be followed.

    Attributes:
        node: the child.
        kept: whether it is followed.
        instead: the token that follows its parent if it is not.
        chance: how likely it was that it is reached and kept, before it was drawn.
    """

    node: int
    kept: bool
    instead: int
    chance: float


def judge_tree(
    law: LawMaker, context: Context, tree: TreeProposal, logits: torch.Tensor, active: list[bool]
) -> TreeJudgement:
    """Walk each row's tree.

    Args:
        law: the verifier's law maker; its processors keep no state.
        context: the rows; tree: what was proposed.
        logits: `[B, T + 1, V]`, column 0 after the context, column j + 1 after node j.
        active: rows that emit.
    """
    scores = tree_scores(law, context, tree, logits)
    p = law.probabilities(scores) if law.do_sample else None
    chosen = scores.argmax(-1) if p is None else law.draw(p.flatten(0, 1)).reshape(p.shape[:2])
    drawn = chosen.tolist()  # [B][T + 1]
    trials = _try_drawn(law, tree, p) if p is not None and any(tree.drawn) else [{} for _ in tree.tokens]
    paths, tokens = [], []
    for row, (of_row, parents) in enumerate(zip(tree.tokens, tree.parents, strict=True)):
        path, last = walk(of_row, parents, drawn[row], trials[row])
        paths.append(path if active[row] else [])
        tokens.append([*(of_row[node] for node in path), last] if active[row] else [])
    places = _emitted_columns(paths).to(logits.device)

    def pick(values: torch.Tensor) -> torch.Tensor:
        return values.gather(1, places[:, :, None].expand(-1, -1, values.shape[2]))

    chances = [{parent: trial.chance for parent, trial in row.items()} for row in trials]
    return TreeJudgement(paths, tokens, pick(logits), pick(scores), None if p is None else pick(p), chances)


def walk(
    tokens: list[int], parents: list[int], drawn: list[int], trials: Mapping[int, Trial] | None = None
) -> tuple[list[int], int]:
    """Follow the draws down a tree: the nodes passed, and the draw that left it.

    Args:
        tokens, parents: of the nodes; drawn: the draw after the context, then after each node.
        trials: by parent, what became of the children that were drawn.
    """
    trials = trials or {}
    tried = {trial.node for trial in trials.values()}
    nodes = enumerate(zip(tokens, parents, strict=True))
    child = {(parent, token): node for node, (token, parent) in nodes if node not in tried}
    path: list[int] = []
    node = ROOT
    while True:
        chosen, trial = child.get((node, drawn[node + 1])), trials.get(node)
        if chosen is not None:
            node = chosen
        elif trial is None:
            return path, drawn[node + 1]
        elif trial.kept:
            node = trial.node
        else:
            return path, trial.instead
        path.append(node)


def _try_drawn(law: LawMaker, tree: TreeProposal, p: torch.Tensor) -> list[dict[int, Trial]]:
    """Judge every drawn child as if its parent were reached and no chosen child followed: per row, by parent.

    Args:
        law: the verifier's law maker; p: `[B, T + 1, V]`, its laws.
        tree: with drawn nodes.
    """
    assert tree.q is not None, "drawn nodes come with what they were drawn from"
    q = tree.q.to(device=p.device, dtype=p.dtype)  # [B, D, V]
    where, nodes = _drawn_columns(tree)
    batch = torch.arange(len(nodes), device=p.device)[:, None]
    rest = p[batch, where.to(p.device)]  # [B, D, V]
    row, place, token = _chosen_beside(tree)
    rest[row, place, token] = 0
    left = rest.sum(-1, keepdim=True)
    # Where chosen children have all the weight the trial is never asked for; any law will do.
    rest = torch.where(left > 0, rest / left, torch.ones_like(rest))
    asked = nodes.to(p.device)  # [B, D]
    chances = left[..., 0] * overlap(rest, q, asked)
    laws, single = rest.flatten(0, 1)[:, None], torch.ones(asked.numel(), dtype=torch.long, device=p.device)
    # The law after an accepted token is never asked for here, so the second place may repeat the first.
    verdict = verify_tokens(asked.view(-1, 1), single, laws.expand(-1, 2, -1), q.flatten(0, 1)[:, None], law.randomness)
    instead = law.draw(verdict.following)
    found = torch.stack([verdict.accepted.to(p.dtype), instead.to(p.dtype), chances.flatten()], dim=1)
    results = found.view(*asked.shape, 3).tolist()
    return [
        {
            parents[node]: Trial(node, bool(kept), int(other), chance)
            for node, (kept, other, chance) in zip(of_row, row_results, strict=False)
        }
        for parents, of_row, row_results in zip(tree.parents, tree.drawn, results, strict=True)
    ]


def _drawn_columns(tree: TreeProposal) -> tuple[torch.Tensor, torch.Tensor]:
    """Of each drawn node `[B, D]` the column of the law after its parent, and its token; filled with zeros."""
    width = max(len(row) for row in tree.drawn)
    columns = torch.zeros(len(tree.drawn), width, dtype=torch.long)
    tokens = torch.zeros_like(columns)
    for b, row in enumerate(tree.drawn):
        columns[b, : len(row)] = torch.tensor([tree.parents[b][node] + 1 for node in row], dtype=torch.long)
        tokens[b, : len(row)] = torch.tensor([tree.tokens[b][node] for node in row], dtype=torch.long)
    return columns, tokens


def _chosen_beside(tree: TreeProposal) -> tuple[list[int], list[int], list[int]]:
    """Of each chosen child that has a drawn sibling: its row, the sibling's place among the drawn, its token."""
    found: tuple[list[int], list[int], list[int]] = ([], [], [])
    for b, (tokens, parents, drawn) in enumerate(zip(tree.tokens, tree.parents, tree.drawn, strict=True)):
        place_of, among = {parents[node]: place for place, node in enumerate(drawn)}, set(drawn)
        for node, (token, parent) in enumerate(zip(tokens, parents, strict=True)):
            if parent in place_of and node not in among:
                for part, value in zip(found, (b, place_of[parent], token), strict=True):
                    part.append(value)
    return found


def record_tree(stats: LevelStats, tree: TreeProposal, judgement: TreeJudgement, active: list[bool]) -> None:
    """Count one check of a batch of trees; a tree's depth counts as the number of tokens drafted.

    The acceptance rate that the laws imply at a node reached is the chance that the tree goes on: the law's weight
    on the chosen children, and the chance of the drawn one. Nodes without children are not judged.
    """
    places: list[tuple[int, int, int]] = []  # row, position of the node on the path, id of a chosen child
    reached, kept, tried = 0, 0, 0.0
    for b, (tokens, parents, path, alive) in enumerate(
        zip(tree.tokens, tree.parents, judgement.paths, active, strict=True)
    ):
        if not alive:
            continue
        stats.record_round(max(depths(parents), default=0), len(path))
        position_of = {node: i for i, node in enumerate([ROOT, *path])}
        reached += len(position_of.keys() & set(parents))
        drawn = set(tree.drawn[b]) if judgement.p is not None and tree.drawn else set()
        for node, (token, parent) in enumerate(zip(tokens, parents, strict=True)):
            if parent in position_of and node not in drawn:
                places.append((b, position_of[parent], token))
        tried += sum(judgement.chances[b][parents[node]] for node in drawn if parents[node] in position_of)
        kept += len(path)
    if not reached:
        return
    if judgement.p is None:
        stats.record_overlap(torch.tensor(float(kept)), reached)
    else:
        at = torch.tensor(places, dtype=torch.long, device=judgement.p.device).view(-1, 3)
        stats.record_overlap(judgement.p[at[:, 0], at[:, 1], at[:, 2]].sum() + tried, reached)


def tree_scores(law: LawMaker, context: Context, tree: TreeProposal, logits: torch.Tensor) -> torch.Tensor:
    """Processed scores `[B, T + 1, V]`; processors that look at ids see each node's own path."""
    nothing: list[list[int]] = [[] for _ in tree.tokens]
    if not law.bound_to_rows:
        return law.scores(context, nothing, logits)
    columns = []
    for column in range(logits.shape[1]):
        paths = [
            [tokens[node] for node in path_to(column - 1, parents)] if column <= len(tokens) else []
            for tokens, parents in zip(tree.tokens, tree.parents, strict=True)
        ]
        columns.append(law.scores(context.extended(paths), nothing, logits[:, column : column + 1]))
    return torch.cat(columns, dim=1)


def _emitted_columns(paths: list[list[int]]) -> torch.Tensor:
    """`[B, E]`: the columns of the laws that the emitted tokens follow, shorter rows filled with their last."""
    width = 1 + max(len(path) for path in paths)
    rows = [[0, *(node + 1 for node in path)] for path in paths]
    return torch.tensor([row + [row[-1]] * (width - len(row)) for row in rows])
