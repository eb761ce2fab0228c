# SPDX-License-Identifier: Apache-2.0
"""When a middle hands up what it holds."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

from ..exactness.proposal import Proposal
from .base import Drafter


class Ending(ABC):
    """Ends the blocks of a row that is alone, in the place of a number of tokens.

    Whatever is decided follows from tokens that are held already and go up in any case, from the laws they were drawn
    from, and from drafts that nobody drew (law 2).
    """

    @abstractmethod
    def choose(self, source: Drafter, held: int, offered: Proposal) -> tuple[bool, Proposal]:
        """Whether a block that holds so many tokens goes up now, with what is left of a draft behind it, unchecked; or
        whether the middle checks that first.

        Args:
            source: who offers; held: tokens of the block; offered: the draft of the one row, empty where there is none.

        Returns:
            Whether the block ends, and the draft, or the beginning of it that is worth its columns. What was drawn goes
            up checked or not at all.
        """

    @abstractmethod
    def add(self, tokens: int, leads: Sequence[float]) -> None:
        """The middle holds so many more tokens, each of which was so far ahead of the second (`Judgement.leads`; empty
        where that cannot be told)."""
