# SPDX-License-Identifier: Apache-2.0
"""What every member of the chain below the target is: something that proposes tokens and says how it drew them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from ..exactness.context import Context
from ..exactness.proposal import Proposal, TreeProposal
from ..exactness.tree_geometry import depths
from ..telemetry.counters import LevelStats

if TYPE_CHECKING:
    from ..exactness.distributions import LawMaker
    from ..exactness.passes import Pass


class Drafter(ABC):
    """A level that can be asked to continue a context.

    Subclass this to plug in a drafter of your own: `propose` is the only method that must be written. A drafter
    object given to `assistant_models` is told about the start of every generation through `begin`, and serves one
    generation at a time: threads need one each, unless it can make copies of itself (`for_another`).

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
    tells_chances: bool = False
    """Whether proposals are made without drawing, and say how likely they are (`Proposal.chances`)."""
    shares_noise: bool = False
    """Whether all chances of a draft come from `law.choose` and `law.race`, or none are taken. While others draft,
    torch's default generator is lent to them, and stands where it stood when they are done."""

    asks_nobody: bool = False
    """Whether no code but this package's runs while it drafts; said anew by every subclass."""

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

    @property
    def role(self) -> str:
        """How messages call this level: its place in the caller's list, and its name."""
        return "the target" if self.index == 0 else f"assistant_models[{self.index - 1}] ({self.name})"

    @property
    def drafts_alone(self) -> bool:
        """`asks_nobody`, which a subclass does not inherit."""
        return bool(type(self).__dict__.get("asks_nobody", False))

    @property
    def most_tokens(self) -> int | None:
        """Tokens that a row is offered at most by this level's own sizes; None, as by default, where it sets no end."""
        return None

    @property
    def tree_nodes(self) -> int:
        """Nodes of the trees that it offers, 0 where it offers none."""
        return 0

    def for_another(self) -> Drafter | None:
        """A drafter that knows what this one does, for a generation that runs while this one is in another; None, as by
        default, if there is none: the second generation is then refused."""
        return None

    def long_is_sure(self, device: torch.device) -> bool:
        """Whether long drafts may pass a middle by (`polyspec_direct_tokens`).

        So it is where nothing is drawn, and a draft is long only if all of it is likely to be right.

        Args:
            device: where the laws of the chain are.
        """
        return False

    def is_sure(self, row: int) -> bool:
        """Whether a row's last proposal is of the kind that `long_is_sure` speaks of."""
        return True

    @abstractmethod
    def propose(self, context: Context, limits: list[int], law: LawMaker) -> Proposal:
        """Continue each row by at most `limits[b]` tokens; proposing fewer, or none, is always allowed.

        Where `law.draws`, exactness rests on two promises. `q` is the very distribution each token was drawn from (None
        if none was). Whether a token is handed up never depends on its own value: stop before drawing, or keep it and
        stop after.
        Elsewhere any tokens will do: they are compared with what the level above says itself, and `q` is not read.

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

    @property
    def watches(self) -> bool:
        """Whether it has a `watch` of its own: all of a pass is made then, whoever else asks for less."""
        return type(self).watch is not Drafter.watch or "watch" in self.__dict__

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

    def add_rows(self, count: int) -> None:
        """So many rows join behind the others, of which nothing is known; asked where `takes_rows`."""

    @property
    def takes_rows(self) -> bool:
        """Whether rows may join while others run (`hf_polyspec.Engine`): a level that follows its rows when some leave
        has to follow them here too."""
        mine = type(self)
        return mine.keep_rows is Drafter.keep_rows or mine.add_rows is not Drafter.add_rows

    def end(self) -> None:
        """The generation is over: release what need not outlive it."""
