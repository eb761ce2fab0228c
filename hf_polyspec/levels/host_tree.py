# SPDX-License-Identifier: Apache-2.0
"""Growing the same trees as `eagle_tree.grow` where a look at every level costs nothing: with lists, on the host.

What is known of a level says which of its nodes can still be among the likeliest: a child is never likelier than its
parent, so below a node that has as many likelier ones beside it as the tree may have nothing is kept. Only what is left
is run through the head.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from ..exactness.tree_geometry import ROOT
from .eagle_tree import Best, Grown

NodeStep = Callable[[list[list[int]], list[list[int]], torch.Tensor, int, torch.Tensor], torch.Tensor]
"""(tokens `[B][k]`, the number of each one's parent among the nodes fed before, -1 for none, features `[B, k, H]`,
depth, who sees which node fed so far `[B, k, N]`) -> `[B, k, H]`."""


@dataclass
class _Node:
    """One candidate.

    Attributes:
        token: its id; above: the node it goes on from, None at the root; score: log of the chance to come here.
        place: its state's among those that its level was run to.
        fed: numbers of the nodes on its path among all that were fed, its own last; nothing before it is fed.
    """

    token: int
    above: _Node | None
    score: float
    place: int = 0
    fed: list[int] = field(default_factory=list)


class _Row:
    """The likeliest nodes of one row so far, in level order, at most as many as are kept in the end.

    Args:
        room: longest path; total: most nodes.
    """

    def __init__(self, room: int, total: int) -> None:
        self.limit = room
        self.total = total
        self.nodes: list[_Node] = []
        self.front: list[_Node] = []  # to be expanded

    def add(self, found: list[_Node], top_k: int, ends: frozenset[int]) -> None:
        """Take in a level, drop what cannot be kept any more, and see what is to be expanded."""
        both = self.nodes + found
        ranked = sorted(range(len(both)), key=lambda i: -both[i].score)[: self.total]  # stable: parents first
        self.nodes = [both[i] for i in sorted(ranked)]
        last = [both[i] for i in ranked if i >= len(both) - len(found)]
        self.front = [node for node in last if node.token not in ends][:top_k]

    def grown(self) -> tuple[list[int], list[int]]:
        """Tokens of the nodes and their parents."""
        number = {id(node): i for i, node in enumerate(self.nodes)}
        parents = [ROOT if node.above is None else number[id(node.above)] for node in self.nodes]
        return [node.token for node in self.nodes], parents


def grow_on_host(
    hidden: torch.Tensor,
    room: list[int],
    total: list[int],
    best: Best,
    step: NodeStep,
    *,
    top_k: int,
    threshold: float = 0.0,
    ends: frozenset[int] = frozenset(),
) -> Grown:
    """A tree per row, that of `grow`; the arguments are the same, but for what runs a level.

    Args:
        hidden, room, total, best, top_k, threshold, ends: see `grow`.
        step: runs the head on some nodes of one level.
    """
    rows = [_Row(*sizes) for sizes in zip(room, total, strict=True)]
    children = min(top_k, max(total))
    fed, out, fronts = 0, hidden, list[list[_Node]]()
    for level in range(max(room, default=0)):
        if level:
            for row in rows:
                sure = row.front and row.front[0].score >= (math.log(threshold) if threshold > 0 else -math.inf)
                row.limit = row.limit if sure else min(row.limit, level)
                row.front = row.front if level < row.limit else []
            fronts = [list(row.front) for row in rows]
            if not any(fronts):
                break
            out, fed = _run(fronts, out, fed, level, step), fed + max(map(len, fronts))
        log_p, ids = (values.tolist() for values in best(out, children))
        for b, row in enumerate(rows):
            above: Sequence[_Node | None] = fronts[b] if level else [None] if row.limit else []
            row.add(_children(above, log_p[b], ids[b]), top_k, ends)
    trees = [row.grown() for row in rows]
    return Grown([tokens for tokens, _ in trees], [parents for _, parents in trees])


def _children(front: Sequence[_Node | None], chances: list[list[float]], tokens: list[list[int]]) -> list[_Node]:
    """What goes on from the nodes of a level; the lists have a row for each of them, and perhaps some more."""
    return [
        _Node(token, node, chance + (0.0 if node is None else node.score), place)
        for place, (node, of_node, after) in enumerate(zip(front, chances, tokens, strict=False))
        for chance, token in zip(of_node, after, strict=True)
        if math.isfinite(chance)
    ]


def _run(fronts: list[list[_Node]], out: torch.Tensor, fed: int, level: int, step: NodeStep) -> torch.Tensor:
    """The head's output `[B, k, H]` after the nodes of a level, of which `fed` were before; `out` is that above."""
    width = max(map(len, fronts))
    tokens, above, places = ([[fill] * width for _ in fronts] for fill in (0, -1, 0))
    sees = np.zeros((len(fronts), width, fed + width), dtype=np.bool_)  # torch takes microseconds to set one of them
    for b, front in enumerate(fronts):
        for i in range(width):
            node = front[i] if i < len(front) else None
            path = [fed + i]
            if node is not None:
                tokens[b][i], places[b][i] = node.token, node.place
                if node.above is not None:
                    above[b][i] = node.above.fed[-1]
                    path = [*node.above.fed, fed + i]
                node.fed = path
            sees[b, i, path] = True
    batch = torch.arange(len(fronts))[:, None]
    return step(tokens, above, out[batch, torch.tensor(places)], level, torch.from_numpy(sees))
