# SPDX-License-Identifier: Apache-2.0
"""From one forward pass over a tree to what a verifier emits.

The tree's nodes were chosen, not drawn, so the rule is the one-hot rule: draw y from p at a node; if y is a child, go
there, else y is the token after the path. However the nodes were chosen, every emitted token is a draw from p.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..context import Context
from ..distributions import LawMaker
from ..telemetry import LevelStats
from ..trees import ROOT, depths, path_to
from .base import TreeProposal


@dataclass(frozen=True)
class TreeJudgement:
    """What a verifier makes of a tree.

    Attributes:
        paths: per row, the nodes kept, from the context on.
        tokens: per row, their tokens and the one drawn after them; empty for rows that were not asked.
        logits, scores: `[B, E, V]` raw and processed, of the emitted positions.
        p: `[B, E, V]` the law each emitted token follows; None in the greedy limit.
    """

    paths: list[list[int]]
    tokens: list[list[int]]
    logits: torch.Tensor
    scores: torch.Tensor
    p: torch.Tensor | None


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
    paths, tokens = [], []
    for row, (of_row, parents) in enumerate(zip(tree.tokens, tree.parents, strict=True)):
        path, last = walk(of_row, parents, drawn[row])
        paths.append(path if active[row] else [])
        tokens.append([*(of_row[node] for node in path), last] if active[row] else [])
    places = _emitted_columns(paths).to(logits.device)

    def pick(values: torch.Tensor) -> torch.Tensor:
        return values.gather(1, places[:, :, None].expand(-1, -1, values.shape[2]))

    return TreeJudgement(paths, tokens, pick(logits), pick(scores), None if p is None else pick(p))


def walk(tokens: list[int], parents: list[int], drawn: list[int]) -> tuple[list[int], int]:
    """Follow the draws down a tree: the nodes passed, and the draw that left it.

    Args:
        tokens, parents: of the nodes; drawn: the draw after the context, then after each node.
    """
    child = {(parent, token): node for node, (token, parent) in enumerate(zip(tokens, parents, strict=True))}
    path: list[int] = []
    node = ROOT
    while (node, drawn[node + 1]) in child:
        node = child[node, drawn[node + 1]]
        path.append(node)
    return path, drawn[node + 1]


def record_tree(stats: LevelStats, tree: TreeProposal, judgement: TreeJudgement, active: list[bool]) -> None:
    """Count one check of a batch of trees; a tree's depth counts as the number of tokens drafted.

    The acceptance rate that the law implies at a node reached is the law's weight on the node's children: the chance
    that the draw stays in the tree. Nodes without children are not judged.
    """
    places: list[tuple[int, int, int]] = []  # row, position of the node on the path, id of a child
    reached, kept = 0, 0
    rows = zip(tree.tokens, tree.parents, judgement.paths, active, strict=True)
    for b, (tokens, parents, path, alive) in enumerate(rows):
        if not alive:
            continue
        stats.record_round(max(depths(parents), default=0), len(path))
        position_of = {node: i for i, node in enumerate([ROOT, *path])}
        children = [(b, position_of[p], t) for t, p in zip(tokens, parents, strict=True) if p in position_of]
        reached += len({position for _, position, _ in children})
        kept += len(path)
        places += children
    if not reached:
        return
    if judgement.p is None:
        stats.record_overlap(torch.tensor(float(kept)), reached)
    else:
        row, position, token = torch.tensor(places, device=judgement.p.device).unbind(1)
        stats.record_overlap(judgement.p[row, position, token].sum(), reached)


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
