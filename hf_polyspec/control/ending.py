# SPDX-License-Identifier: Apache-2.0
"""When a middle's block goes up: as soon as its next token is worth less than the pass it takes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

from ..exactness.proposal import Proposal
from ..levels.base import Drafter
from ..levels.elsewhere import asking_here
from ..levels.ending import Ending
from ..levels.joined import JoinedDrafter
from ..levels.verifier import Verifier
from .costs import DRAFTS, Costs, mean_emitted
from .cutting import affordable
from .setups import Chain

OF_SPEED = 0.9
"""Of the speed that blocks of one length promise, which a token must be worth its time at: those that end where a copy
is unsure are quicker, and what a profile says of a text may be wrong."""


class WorthEnding(Ending):
    """Goes on while it pays.

    A token that is handed up and right is worth the time in which the chain would write one otherwise, times the chance
    that all tokens before it are right (`Leads`). Against that stand a pass of the middle and a column of the
    target's. Drafts of a level that costs nothing may stand behind a block unchecked: then they cost columns only.

    Args:
        level: the middle; costs: what is known of passes and of how often it is right.

    Attributes:
        spare: see `Cut.spare`.
    """

    def __init__(self, level: Verifier, costs: Costs) -> None:
        self.level = level
        self.costs = costs
        self.spare = math.inf
        self.leads: list[float] = []
        self._right = 1.0
        self._worth = 0.0
        self._told = True

    def choose(self, source: Drafter, held: int, offered: Proposal) -> tuple[bool, Proposal]:
        if not held:
            self.leads, self._right, self._told = [], 1.0, True
            speed = max(1.0, OF_SPEED * self.costs.most_of_blocks(self.costs.middle.value))
            self._worth = self.costs.seconds(0, 1) / speed
        told = offered.q is None and offered.chances is not None
        chances = offered.chances()[0][: offered.width] if told and offered.chances is not None else []
        if len(chances) < offered.width:  # a head's, which may be drawn: it is checked, or none of it goes up
            drafter = _who(source)
            # How many tokens were drawn may follow from their values, how many were to be drawn does not (law 2).
            count = offered.width if offered.q is None else min(drafter.most_tokens or 1, max(DRAFTS))
            emitted = 1.0 if self.costs.head is None else mean_emitted(self.costs.head.value, count)
            ends = held >= self.level.block_size or self._going(held, emitted, count) < 0
            drafter.stats.drafted -= offered.width if ends else 0
            return ends, offered.cut([0]) if ends else offered
        sums = [0.0]
        if chances and self.spare < math.inf:
            chances = chances[: affordable(len(chances), partial(self.costs.seconds, 0), self.spare)]
        for chance in chances:
            sums.append(sums[-1] + chance)
        behind = max(range(len(sums)), key=lambda size: self._behind(held, sums[size], size))
        checked = max(range(len(sums)), key=lambda size: self._going(held, 1 + sums[size], size))
        more = self._going(held, 1 + sums[checked], checked) if held < self.level.block_size else -1.0
        ends = more <= self._behind(held, sums[behind], behind)
        size = behind if ends else checked
        _who(source).stats.drafted -= offered.width - size
        return ends, offered.cut([size]) if size < offered.width else offered

    def add(self, tokens: int, leads: Sequence[float]) -> None:
        if len(leads) < tokens:  # what was drawn tells nothing by its lead
            self._right, self._told = self._right * self.costs.middle.value**tokens, False
        for lead in leads:
            self._right *= self.costs.leads.chance(lead)
        self.leads += leads

    def judged(self, accepted: int) -> None:
        """So many of the tokens of the last block were kept."""
        if self._told:
            self.costs.leads.learn(self.leads, accepted)

    def _going(self, held: int, emitted: float, draft: int) -> float:
        """Seconds won by a pass of the middle over a draft, of which it makes so many tokens."""
        won = self._right * self.costs.middle.value * emitted * self._worth
        columns = self.costs.seconds(0, held + emitted + 1) - self.costs.seconds(0, held + 1)
        return won - columns - self.costs.seconds(1, 1 + draft)

    def _behind(self, held: int, kept: float, draft: int) -> float:
        """Seconds won by a draft behind the block, of which so many tokens are expected to be kept."""
        columns = self.costs.seconds(0, held + draft + 1) - self.costs.seconds(0, held + 1)
        return self._right * kept * self._worth - columns


def _who(source: Drafter) -> Drafter:
    """Of a level of two drafters, the one whose draft the row that is alone was offered last."""
    return (source.branch if source.is_sure(0) else source.head) if isinstance(source, JoinedDrafter) else source


def ending_of(chain: Chain, costs: Costs) -> WorthEnding | None:
    """Lets the middle of a chain end its blocks so, if there is one whose drafts are no trees.

    One whose passes several processes share ends its blocks alike in all of them, and only one of them runs a control.
    """
    level = chain.verifiers[-1]
    shared = asking_here(level) is not level
    if level.index == 0 or shared or (chain.leaf is not None and chain.leaf.grows_trees):
        return None
    level.ending = WorthEnding(level, costs)
    return level.ending
