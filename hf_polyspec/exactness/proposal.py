# SPDX-License-Identifier: Apache-2.0
"""What a level offers to the one above, with the law each token was drawn from (law 1)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch


@dataclass(frozen=True)
class Proposal:
    """Tokens offered to the level above, with the law each was drawn from (law 1).

    Attributes:
        tokens: a list of ids per row; rows may have different lengths, an empty row proposes nothing.
        q: `[B, K, V]` with K the longest row, row i of it the distribution token i was drawn from, after all logits
            processors; entries beyond a row's length mean nothing. None says one-hot: the proposer did not draw.
        origins: like `tokens`, the index of the level that first proposed each token.
        chances: what gives, like `tokens`, the chance that the row is accepted up to each, as far as a proposer that
            drew nothing can tell; to be asked before the next proposal. None where it cannot.
    """

    tokens: list[list[int]]
    q: torch.Tensor | None
    origins: list[list[int]]
    chances: Callable[[], list[list[float]]] | None = None

    @classmethod
    def empty(cls, rows: int) -> Proposal:
        """Of nothing, for so many rows."""
        return cls([[] for _ in range(rows)], None, [[] for _ in range(rows)])

    @property
    def width(self) -> int:
        """Longest row."""
        return max((len(row) for row in self.tokens), default=0)

    def cut(self, lengths: Sequence[int]) -> Proposal:
        """The first tokens of each row."""
        tokens, origins = (
            [row[:length] for row, length in zip(rows, lengths, strict=True)] for rows in (self.tokens, self.origins)
        )
        q = None if self.q is None or not any(lengths) else self.q[:, : max(lengths)]
        return replace(self, tokens=tokens, q=q, origins=origins)

    def select(self, rows: list[int]) -> Proposal:
        """Of some rows, in this order."""
        tokens = [self.tokens[row] for row in rows]
        q = None if self.q is None else self.q[rows, : max(map(len, tokens))]
        told = self.chances
        chances = None if told is None else lambda: [told()[row] for row in rows]
        return Proposal(tokens, q, [self.origins[row] for row in rows], chances)


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

    def select(self, rows: list[int]) -> TreeProposal:
        """Of some rows, in this order."""
        tokens, parents, origins, drawn = (
            [of_row[row] for row in rows] if of_row else []
            for of_row in (self.tokens, self.parents, self.origins, self.drawn)
        )
        return TreeProposal(tokens, parents, origins, drawn, None if self.q is None else self.q[rows])


def proposal_fault(proposal: object, limits: Sequence[int], vocabulary: int) -> str | None:
    """What is wrong with what a drafter handed up, as the end of a sentence; None if nothing.

    Args:
        limits: most tokens that each row was to propose; vocabulary: ids there are.
    """
    if not isinstance(proposal, Proposal):
        return f"proposed {_shown(proposal)}, and propose() must return a Proposal"
    if not isinstance(proposal.tokens, list) or len(proposal.tokens) != len(limits):
        rows = len(proposal.tokens) if isinstance(proposal.tokens, list) else _shown(proposal.tokens)
        return f"proposed tokens for {rows} rows, and this batch has {len(limits)}"
    if [len(row) for row in proposal.origins] != [len(row) for row in proposal.tokens]:
        return "handed up origins of another form than its tokens: there is one for each token"
    for tokens, limit in zip(proposal.tokens, limits, strict=True):
        if len(tokens) > limit:
            return f"proposed {len(tokens)} tokens where at most {limit} were asked for"
        fault = _unknown(tokens, vocabulary)
        if fault is not None:
            return fault
    q = proposal.q
    if q is not None and proposal.width:
        wanted = f"[{len(limits)}, {proposal.width}, {vocabulary}]"
        if not isinstance(q, torch.Tensor) or q.dim() != 3:
            return f"handed up a q that is no tensor {wanted}: {_shown(q)}"
        if q.shape[0] != len(limits) or q.shape[1] < proposal.width or q.shape[2] != vocabulary:
            return f"handed up a q of shape {list(q.shape)}, and {wanted} is wanted"
    return None


def tree_fault(tree: object, rows: int, vocabulary: int) -> str | None:
    """The same for a tree of `rows` rows."""
    if not isinstance(tree, TreeProposal):
        return f"proposed {_shown(tree)}, and propose_tree() must return a TreeProposal or None"
    if not len(tree.tokens) == len(tree.parents) == len(tree.origins) == rows:
        return f"proposed trees for {len(tree.tokens)} rows, and this batch has {rows}"
    for tokens, parents in zip(tree.tokens, tree.parents, strict=True):
        if len(tokens) != len(parents) or any(not -1 <= parent < node for node, parent in enumerate(parents)):
            return "proposed a tree in which a node stands before its parent, or has none"
        fault = _unknown(tokens, vocabulary)
        if fault is not None:
            return fault
    return None


def _unknown(tokens: Sequence[int], vocabulary: int) -> str | None:
    if tokens and not (min(tokens) >= 0 and max(tokens) < vocabulary):
        wrong = next(token for token in tokens if not 0 <= token < vocabulary)
        return f"proposed the id {wrong}, and ids go from 0 to {vocabulary - 1}"
    return None


def _shown(value: object) -> str:
    return "None" if value is None else f"a {type(value).__name__}"
