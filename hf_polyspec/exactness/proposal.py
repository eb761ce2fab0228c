# SPDX-License-Identifier: Apache-2.0
"""What a level offers to the one above, with the law each token was drawn from (law 1)."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch


@dataclass(frozen=True)
class Proposal:
    """Tokens offered to the level above, with the law each was drawn from (law 1).

    Attributes:
        tokens: a list of ids per row; rows may have different lengths, an empty row proposes nothing.
        q: `[B, K, V]` with K the longest row, row i of it the distribution token i was drawn from, after all logits
            processors; entries beyond a row's length mean nothing. None says one-hot: the proposer did not draw.
        origins: like `tokens`, the index of the level that first proposed each token.
    """

    tokens: list[list[int]]
    q: torch.Tensor | None
    origins: list[list[int]]

    @property
    def width(self) -> int:
        """Longest row."""
        return max((len(row) for row in self.tokens), default=0)


@dataclass(frozen=True)
class TreeProposal:
    """Several continuations at once: children of a node that were chosen, and children that were drawn.

    The drawn children of a node were drawn one after another, each from a law of its own that may depend on those
    before it: without replacement, for one. How many there are and which were chosen beside them must not depend on
    their values (law 2); what is below them may.

    Attributes:
        tokens: per row, the nodes' ids, parents before their children; no two chosen children of a node are equal.
        parents: per row, the index of each node's parent among them, -1 for nodes that follow the context.
        origins: like `tokens`, the index of the level that first proposed each.
        drawn: per row, the nodes that were drawn, those of one parent in the order they were drawn in; empty where no
            row has any.
        q: `[B, D, V]` with D the most drawn nodes of a row, row i of it the distribution that the row's i-th drawn node
            was drawn from, after all logits processors; None where nothing was drawn.
    """

    tokens: list[list[int]]
    parents: list[list[int]]
    origins: list[list[int]]
    drawn: list[list[int]] = field(default_factory=list)
    q: torch.Tensor | None = None
