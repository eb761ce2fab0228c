# SPDX-License-Identifier: Apache-2.0
"""How large the tree of a row is, from what became of the row's earlier ones."""

from __future__ import annotations

from dataclasses import InitVar, dataclass

GROW, SHRINK = 2, 1


@dataclass
class TreeSize:
    """Depth and number of nodes of a row's next tree, never above what the caller allowed and never below 1.

    Changed only between rounds, by how deep the row's trees were followed: known before anything of the next tree is
    judged, so exact (law 2). The depth moves as transformers' `num_assistant_tokens_schedule="heuristic"` moves the
    length of a draft: two more after a tree was followed to its end, else one fewer. The nodes shrink with it, in
    proportion but never below one a level. A row whose trees fail keeps drafting one level: a drafter that is never
    asked again could not show that it has become useful.

    Args:
        most_depth: levels that the caller allowed, 1 or more.
        most_nodes: nodes that the caller allowed, 1 or more.
        first_depth: of the first tree, None for all that is allowed.
    """

    most_depth: int
    most_nodes: int
    first_depth: InitVar[int | None] = None

    def __post_init__(self, first_depth: int | None) -> None:
        self.depth = self.most_depth if first_depth is None else min(self.most_depth, first_depth)

    @property
    def nodes(self) -> int:
        """Nodes of the next tree."""
        share = -(-self.most_nodes * self.depth // self.most_depth)  # rounded up
        return min(self.most_nodes, max(share, self.depth))

    def observe(self, drafted: int, accepted: int) -> None:
        """A tree of `drafted` levels was followed for `accepted` of them."""
        if drafted:
            change = GROW if accepted >= drafted else -SHRINK
            self.depth = min(self.most_depth, max(1, self.depth + change))
