# SPDX-License-Identifier: Apache-2.0
"""Which levels take part, how many tokens each hands up, and what that is expected to bring."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from ..levels.base import Drafter
from ..levels.eagle import EagleDrafter
from ..levels.joined import JoinedDrafter
from ..levels.sequential import SequentialDrafter
from ..levels.verifier import NoDraft, Verifier
from ..planning.theory.cost_model import Acceptance, Member, Prediction, SecondsTable, predict
from .estimates import EXPECTED, OPTIMISTIC, Knowledge

DRAFTS = (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 16, 24)
BLOCKS = (1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 24)
TREES = (4, 8, 12, 16, 24, 32, 48, 64)
_TABLE = (1, 2, 3, 4, 5, 6, 7, 8, 9, 12, 16, 24, 32, 64)
MOST_SUBSETS = 32

Pair = tuple[int, int]


@dataclass(frozen=True)
class Setup:
    """One way of running the chain.

    Attributes:
        levels: indices of the levels that take part, the target first.
        sizes: tokens that each of them but the target hands up: block sizes, then the draft length.
        tree: tokens of the drafter's tree, 0 for a chain of `sizes[-1]`.
        head: tokens that a head drafts where something else drafts beside it, up to `sizes[-1]`; None for as many.
    """

    levels: tuple[int, ...]
    sizes: tuple[int, ...] = ()
    tree: int = 0
    head: int | None = None

    @property
    def pairs(self) -> tuple[Pair, ...]:
        """Adjacent levels, the upper first."""
        return tuple(itertools.pairwise(self.levels))

    def at_most(self, size: int, *, leaf: bool = True) -> Setup:
        """The same levels with no more than `size` tokens each, and a tree of no more than 8 times as many.

        Args:
            size: of blocks and drafts; leaf: False to leave the last level's as they are.
        """
        sizes = tuple(min(size, one) for one in self.sizes)
        if not leaf:
            sizes = (*sizes[:-1], *self.sizes[-1:])
        if self.tree:
            return Setup(self.levels, (*sizes[:-1], self.sizes[-1]), min(self.tree, 8 * size))
        return Setup(self.levels, sizes, head=None if self.head is None else min(size, self.head))

    def drafting(self, size: int) -> Setup:
        """The same with no more than `size` tokens of its last level."""
        head = None if self.head is None else min(size, self.head)
        return replace(self, sizes=(*self.sizes[:-1], min(size, self.sizes[-1])), head=head)

    def size_of(self, level: int) -> int:
        """Tokens (of a tree: nodes) that a level hands up; 0 if it does not take part."""
        if level == 0 or level not in self.levels:
            return 0
        return self.tree if self.tree and level == self.levels[-1] else self.sizes[self.levels.index(level) - 1]


PLAIN = Setup((0,))


def spine(top: Verifier) -> list[Drafter]:
    """A verifier and what lies below it, one after the other; a drafter of several parts is one."""
    found: list[Drafter] = [top]
    while isinstance(found[-1], Verifier):
        found.append(found[-1].below)
    return found


class Chain:
    """The levels of a chain as something that can be set up in several ways.

    Args:
        levels: the target first.
    """

    def __init__(self, levels: Sequence[Drafter]) -> None:
        self.levels = list(levels)
        self.verifiers = [level for level in levels if isinstance(level, Verifier)]
        self.last = len(self.levels) - 1
        self.leaf = self.levels[-1] if not isinstance(self.levels[-1], Verifier) else None
        self.nothing = NoDraft()
        self.trees = bool(
            isinstance(self.leaf, EagleDrafter) and self.leaf.tree_tokens and len(levels) > 1 and self._above().trees
        )
        self.depth = self.leaf.tree_depth if isinstance(self.leaf, EagleDrafter) else 0
        self.tree_start = self.leaf.tree_tokens if isinstance(self.leaf, EagleDrafter) else 0
        # A drafter without a model offers many tokens at little cost.
        self.drafts = DRAFTS[:-1] if isinstance(self.leaf, SequentialDrafter) else DRAFTS
        self._original = {
            name: getattr(self.leaf, name)
            for name in ("draft_tokens", "schedule", "tree_tokens")
            if isinstance(self.leaf, SequentialDrafter) and hasattr(self.leaf, name)
        }
        if isinstance(self.leaf, SequentialDrafter):
            # One master is enough for the length of a draft.
            self.leaf.schedule = "constant"

    def restore(self) -> None:
        """Give a drafter back as it came: it may be the caller's own object."""
        for name, value in self._original.items():
            setattr(self.leaf, name, value)
        for verifier in self.verifiers:
            verifier.observer = None

    def _above(self) -> Verifier:
        return self.verifiers[-1]

    def subsets(self) -> list[tuple[int, ...]]:
        """Every choice of levels that can work together, the whole chain first, plain decoding last."""
        found = []
        for count in range(self.last, -1, -1):
            for chosen in itertools.combinations(range(1, self.last + 1), count):
                levels = (0, *chosen)
                if self._works(levels):
                    found.append(levels)
        return [*found[: MOST_SUBSETS - 1], (0,)] if len(found) > MOST_SUBSETS else found

    def _works(self, levels: tuple[int, ...]) -> bool:
        # Who reads the passes of the level above can serve under no other.
        if self.leaf is None or self.last not in levels or type(self.leaf).watch is Drafter.watch:
            return True
        return self.last == 0 or self.last - 1 in levels

    def note(self, setup: Setup, before: Setup | None, emitted: float) -> list[int]:
        """The levels' own statistics of a change.

        Args:
            setup: that is to be run; before: that was, None for none; emitted: tokens so far.

        Returns:
            The levels that are switched on.
        """
        found = []
        for index, level in enumerate(self.levels[1:], 1):
            size, was = setup.size_of(index), None if before is None else before.size_of(index)
            if size == was:
                continue
            if size and not was:
                found.append(index)
            for part in getattr(level, "parts", [level]):
                part.stats.switched_off += int(was is not None and size == 0)
                part.stats.switched_on += int(was == 0)
                part.stats.sizes.append((emitted, size))
        return found

    def apply(self, setup: Setup) -> None:
        """Let the levels run in this way from the next round on."""
        below = dict(setup.pairs)
        for index, verifier in enumerate(self.verifiers):
            if index not in setup.levels:
                continue
            lower = below.get(index)
            verifier.source = self.nothing if lower is None else self.levels[lower]
            verifier.draft_limit = None
            if lower is None:
                continue
            source, size = self.levels[lower], setup.size_of(lower)
            if isinstance(source, Verifier):
                source.block_size = size
            elif setup.tree and isinstance(source, EagleDrafter):
                source.resize_trees(size)
            elif isinstance(source, SequentialDrafter):
                source.draft_tokens = size
            elif isinstance(source, JoinedDrafter) and setup.head is not None:
                source.share_out(setup.head, size)
            else:
                verifier.draft_limit = size


class Forecast:
    """What setups are expected to bring, from what is known now.

    Args:
        chain: the levels; knowledge: what was measured; rows: of the batch.
        hoped: pairs of levels whose acceptance is to be taken as good: they are to be tried.
    """

    def __init__(self, chain: Chain, knowledge: Knowledge, rows: int, hoped: frozenset[Pair] = frozenset()) -> None:
        self.chain = chain
        self.knowledge = knowledge
        self.rows = rows
        self.hoped = hoped
        self._tables: dict[int, SecondsTable] = {}

    def best(self, levels: tuple[int, ...]) -> tuple[Setup, Prediction]:
        """The sizes of the highest predicted tokens/s for these levels, lowest first, which is the best of all
        combinations (`theory.rounds.best_chain_blocks`)."""
        if levels == (0,):
            return PLAIN, self.predict(PLAIN)
        setup = Setup(levels[-2:])
        for upper in range(len(levels) - 2, -1, -1):
            part = levels[upper:]
            options = [self._with(setup, part, size) for size in self._sizes(*part[:2])]
            setup = max(options, key=lambda one: self.predict(one).tokens_per_second)
        return setup, self.predict(setup)

    def _sizes(self, upper: int, lower: int) -> Sequence[int]:
        if self.chain.trees and lower == self.chain.last:
            return sorted({*TREES, self.chain.tree_start})
        sizes = BLOCKS if isinstance(self.chain.levels[lower], Verifier) else self.chain.drafts
        if (upper, lower) in self.hoped:
            return sizes
        # Where no proposal has reached yet nothing is known: go there in steps.
        reached = len(self.knowledge.agreement(upper, lower).tried)
        return [size for size in sizes if size <= max(4, 2 * reached)]

    def _with(self, setup: Setup, part: tuple[int, ...], size: int) -> Setup:
        if part[1] == self.chain.last and self.chain.trees:
            return Setup(part, (self.chain.depth,), size)
        return Setup(part, (size, *setup.sizes), setup.tree)

    def predict(self, setup: Setup, *, accepted: bool = True) -> Prediction:
        """One round of a setup; its first level need not be the target.

        Args:
            setup: which levels and sizes; accepted: False for the worst case, in which nothing is.
        """
        levels = setup.levels
        members = []
        for place, level in enumerate(levels):
            acceptance = Acceptance(())
            if place and accepted:
                acceptance = self.acceptance(levels[place - 1], level, setup)
            members.append(Member("", self._member_table(setup, place), acceptance))
        drafted = None
        if setup.tree:
            drafted = setup.tree
        elif len(levels) > 1 and not isinstance(self.chain.levels[levels[-1]], Verifier):
            share = self.knowledge.agreement(levels[-2], levels[-1]).share_offered if accepted else 1.0
            drafted = max(1, round(share * setup.sizes[-1]))
        return predict(members, setup.sizes, drafted=drafted)

    def _member_table(self, setup: Setup, place: int) -> SecondsTable:
        level = setup.levels[place]
        if place == len(setup.levels) - 1 and place:
            if isinstance(self.chain.levels[level], Verifier):
                # A middle over nothing draws one token a pass.
                return SecondsTable.per_token(self._verifier_table(level).seconds(1))
            size = setup.tree or setup.sizes[-1]
            tree = bool(setup.tree)
            seconds = [(k, self.knowledge.draft_seconds(level, k, self.rows, tree)) for k in sorted({1, size})]
            return SecondsTable(tuple(seconds))
        return self._verifier_table(level)

    def _verifier_table(self, level: int) -> SecondsTable:
        if level not in self._tables:
            points = tuple((k, self.knowledge.pass_seconds(level, self.rows * k)) for k in _TABLE)
            self._tables[level] = SecondsTable(points)
        return self._tables[level]

    def acceptance(self, upper: int, lower: int, setup: Setup) -> Acceptance:
        """What is expected, or hoped, of a pair of levels."""
        depth = setup.sizes[setup.levels.index(lower) - 1] + 1
        if (upper, lower) in self.hoped:
            return Acceptance.constant(OPTIMISTIC)
        tree = setup.tree if lower == self.chain.last else 0
        counts = self.knowledge.agreement(upper, lower, tree)
        return counts.acceptance(depth, self._prior(upper, lower, tree))

    def _prior(self, upper: int, lower: int, tree: int) -> float:
        """First guess at the acceptance of a pair: from trees of other sizes, or from the levels between."""
        if tree:
            near = [
                (abs(size - tree), size, counts)
                for (u, low, size), counts in self.knowledge.agreements.items()
                if (u, low) == (upper, lower) and size and size != tree and counts.rounds
            ]
            if near:
                _, size, counts = min(near, key=lambda one: one[:2])
                # Each doubling of a tree is taken to catch a fifth of what still escaped it.
                return 1 - (1 - counts.acceptance(1, EXPECTED).at_least(1)) * float((size / tree) ** 0.3)
            return EXPECTED
        between = [self.knowledge.agreements.get((i, i + 1, 0)) for i in range(upper, lower)]
        known = [counts for counts in between if counts is not None and counts.rounds]
        if lower - upper > 1 and len(known) == len(between):
            return math.prod(counts.acceptance(1, EXPECTED).at_least(1) for counts in known)
        return EXPECTED
