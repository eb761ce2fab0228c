# SPDX-License-Identifier: Apache-2.0
"""How many tokens a head drafts where something that costs nothing drafts beside it: none while that does not pay."""

from __future__ import annotations

from ..levels.base import Drafter
from ..levels.joined import JoinedDrafter
from ..levels.sequential import SequentialDrafter
from .costs import HEAD, Costs, Standing

SHORTEST_WAIT, LONGEST_WAIT = 32.0, 1024.0
"""Tokens after which a head that did not pay is asked again."""
HOPED = 0.75
"""Share of its tokens that is expected to be right then, at least."""
TRIAL = 1
"""Tokens of its drafts at most until it has paid again."""
ENOUGH = 8
"""Drafts of which something was kept, after which what was lost before is forgotten."""
MISSED = 2
"""How many of them one counts for of which nothing was."""


class Heads:
    """The head of a chain's last level, if it has one that drafts in chains.

    Args:
        leaf: the last level; costs: what is known, the head's share among it; standing: remembers when it is due.

    Attributes:
        beside: whether something else drafts beside the head.
    """

    def __init__(self, leaf: Drafter | None, costs: Costs, standing: Standing) -> None:
        self.leaf = leaf
        self.costs = costs
        self.standing = standing
        self.beside = isinstance(leaf, JoinedDrafter)
        head = leaf.head if isinstance(leaf, JoinedDrafter) else leaf
        grows = leaf is not None and leaf.grows_trees
        self.known = isinstance(head, SequentialDrafter) and costs.head is not None and not grows
        self._paid = 0

    def drafted(self, row: int) -> bool:
        """Whether a row's last draft came from the head."""
        return self.known and not (isinstance(self.leaf, JoinedDrafter) and self.leaf.is_sure(row))

    @property
    def on_trial(self) -> bool:
        """Whether it has yet to pay again, or for the first time."""
        return self.known and (HEAD in self.standing.waits or self._paid < ENOUGH)

    def tokens(self, level: int, rows: int) -> int:
        """Tokens of its next drafts under a level; 0 for none."""
        share, standing = self.costs.head, self.standing
        assert share is not None
        best = self.costs.steps(level, rows)
        if not best and standing.tokens >= standing.due.get(HEAD, 0.0):
            # What is not asked is never seen to be right again.
            wait = min(LONGEST_WAIT, 2 * standing.waits.get(HEAD, SHORTEST_WAIT / 2))
            standing.waits[HEAD], standing.due[HEAD], self._paid = wait, standing.tokens + wait, 0
            share.hope(HOPED)
            best = self.costs.steps(level, rows)
        elif best and self._paid >= ENOUGH:
            standing.waits.pop(HEAD, None)
        return best if HEAD not in standing.waits else min(best, TRIAL)

    def observe(self, drafted: int, accepted: int) -> None:
        """A draft of the head was judged."""
        assert self.costs.head is not None
        self.costs.head.add(drafted, accepted)
        self._paid = max(0, self._paid + (1 if accepted else -MISSED))
