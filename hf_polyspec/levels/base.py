# SPDX-License-Identifier: Apache-2.0
"""What every member of the chain below the target is: something that proposes tokens and says how it drew them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from ..context import Context
from ..telemetry import LevelStats
from ..trees import depths

if TYPE_CHECKING:
    from ..distributions import LawMaker
    from ..runner import Pass


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


class Drafter(ABC):
    """A level that can be asked to continue a context.

    Subclass this to plug in a drafter of your own: `propose` is the only method that must be written. A drafter
    object given to `assistant_models` is told about the start of every generation through `begin`, and serves one
    generation at a time: threads need one each.

    Attributes:
        name: shown in telemetry and error messages.
        index: place in the chain, 1 for the level below the target; set when the chain is built.
        stats: counters of the current generation.
    """

    name: str = "drafter"
    max_batch: int | None = None
    """Largest number of rows `propose` can serve, None for any."""
    reads_layers: Sequence[int] = ()
    """Entries of the `hidden_states` of the level above that `watch` reads; the others are not kept."""
    grows_trees: bool = False
    """Whether `propose_tree` ever offers something."""

    def __init__(self) -> None:
        self.index = 1
        self.stats = LevelStats(self.name, self.index)

    def begin(self, index: int, batch: int, vocabulary: int) -> None:
        """A generation starts: forget everything that belongs to an earlier one.

        Args:
            index: this level's place in the chain.
            batch: number of rows.
            vocabulary: number of columns V of every law in this chain.
        """
        self.index = index
        self.stats = LevelStats(self.name, index)

    def long_is_sure(self, device: torch.device) -> bool:
        """Whether long drafts may pass a middle by (`polyspec_direct_tokens`).

        So it is where nothing is drawn, and a draft is long only if all of it is likely to be right.

        Args:
            device: where the laws of the chain are.
        """
        return False

    @abstractmethod
    def propose(self, context: Context, limits: list[int], law: LawMaker) -> Proposal:
        """Continue each row by at most `limits[b]` tokens; proposing fewer, or none, is always allowed.

        Exactness rests on two promises. `q` is the very distribution each token was drawn from (None if none was).
        Whether a token is handed up never depends on its own value: stop before drawing, or keep it and stop after.

        Args:
            context: the rows to continue; may be shorter or different from the last call's.
            limits: per row, 0 for rows that need nothing.
            law: turns raw logits into distributions and draws from them; this level's own copy.
        """

    def propose_tree(self, context: Context, limits: list[int], law: LawMaker) -> TreeProposal | None:
        """Like `propose`, for a level above that can check a tree; None says that there is none to offer."""
        return None

    def watch(self, passed: Pass) -> None:
        """Shown every forward pass of the level directly above, for drafters that read its hidden states."""

    def observe(self, drafted: list[int], accepted: list[int]) -> None:
        """Told after each check how many of each row's proposed tokens were accepted."""

    def observe_tree(self, tree: TreeProposal, paths: list[list[int]]) -> None:
        """Told after each check of a tree which of its nodes were accepted, per row from the context on.

        By default passed on to `observe`, with the tree's depth as the number of tokens drafted.
        """
        drafted = [max(depths(parents), default=0) for parents in tree.parents]
        self.observe(drafted, [len(path) for path in paths])

    def prefill(self, context: Context, chunk: int) -> None:
        """Read a long prompt in pieces of `chunk` columns, where that saves memory."""

    def keep_rows(self, rows: list[int]) -> None:
        """Only these rows of the batch go on, in this order."""

    def end(self) -> None:
        """The generation is over: release what need not outlive it."""
