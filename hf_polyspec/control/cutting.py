# SPDX-License-Identifier: Apache-2.0
"""Drafts that nobody drew, each cut where its own tokens no longer pay."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection

from ..exactness.context import Context
from ..exactness.distributions import LawMaker
from ..exactness.proposal import Proposal
from ..levels.base import Drafter
from ..levels.elsewhere import asking_here
from ..levels.verifier import Verifier
from .allotment import allotted


class Cut:
    """Stands between a verifier and a level below it that says how likely its tokens are.

    A draft that nobody drew may be looked at: it follows from the text, and so its length may follow from its chances.
    They say at once that a copy has begun, which the fate of drafts before it would say many rounds later.

    Args:
        level: asks through this from now on; seconds: of the pass that checks, over so many columns.

    Attributes:
        idle: whether drafts stay as they are.
        spare: seconds that the columns of a row's draft behind the first may take, whatever it says of itself.
    """

    def __init__(self, level: Verifier, seconds: Callable[[float], float]) -> None:
        self.level = level
        self.seconds = seconds
        self.idle, self.spare = False, math.inf
        asking = asking_here(level)
        self._ask = asking.ask
        asking.ask = self.ask

    def ask(
        self, source: Drafter, context: Context, rooms: list[int], law: LawMaker, vocabulary: int, eos: Collection[int]
    ) -> Proposal:
        """See `asking.ask`."""
        offered = self._ask(source, context, rooms, law, vocabulary, eos)
        if self.idle or offered.q is not None or offered.chances is None or not offered.width:
            return offered
        rows = max(1, sum(room > 0 for room in rooms))
        chances = [row[: len(own)] for row, own in zip(offered.chances(), offered.tokens, strict=True)]
        # Rows of which nothing is said have something of another kind to offer, which stays as it is.
        wanted = [
            count if told else len(own)
            for count, told, own in zip(
                allotted(chances, self.seconds, rows, rectangular=rows > 1), chances, offered.tokens, strict=True
            )
        ]
        if rows == 1 and self.spare < math.inf:
            wanted = [affordable(count, self.seconds, self.spare) for count in wanted]
        left = sum(len(own) - count for own, count in zip(offered.tokens, wanted, strict=True))
        if not left:
            return offered
        getattr(source, "branch", source).stats.drafted -= left
        return offered.cut(wanted)


def affordable(count: int, seconds: Callable[[float], float], spare: float) -> int:
    """Tokens of a draft of so many whose columns behind the first take no longer than that; 1 in any case, if any.

    What is said of a draft, however likely, may be wrong of every one.

    Args:
        seconds: of the pass that checks, over so many columns; spare: seconds.
    """
    while count > 1 and seconds(1 + count) - seconds(2) > spare:
        count -= 1
    return count
