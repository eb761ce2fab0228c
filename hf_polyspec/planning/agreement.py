# SPDX-License-Identifier: Apache-2.0
"""What drafters offer along text the target wrote, and how long they take for it; see `readings` for the chances."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ..exactness.context import Context
from ..exactness.distributions import LawMaker
from ..exactness.noise import Noise
from ..exactness.proposal import TreeProposal
from ..exactness.tree_geometry import ROOT
from ..host.states import empty_cache
from ..levels.base import Drafter
from ..levels.verifier import Verifier
from ..telemetry.counters import LevelStats
from .costs import draft_lengths
from .readings import NEVER, Array, Reading, agreed, logits_along
from .rig import rig
from .texts import Law, Resting, Text
from .theory.cost_model import SecondsTable

Flags = np.ndarray[Any, np.dtype[np.bool_]]


@dataclass(frozen=True)
class TreeSize:
    """Of the trees an EAGLE head grows: nodes kept, longest path, nodes followed at each depth."""

    tokens: int
    depth: int
    top_k: int


TREES = (TreeSize(6, 3, 3), TreeSize(12, 4, 4), TreeSize(24, 5, 6))


@dataclass(frozen=True)
class Draft:
    """What a drafter offered a verifier along one text.

    Attributes:
        logs: `[N, K]` of the chance that depth j of the draft that starts at position t is kept if those before it are;
            -inf where nothing was offered.
        columns: `[N]` tokens offered (a tree: nodes).
        recorded: `[N]` whether a draft was made there; the other rows mean nothing.
    """

    logs: Array
    columns: Array
    recorded: Flags


@dataclass(frozen=True)
class DraftRecord:
    """A drafter under one verifier.

    Attributes:
        drafts: one a text.
        seconds: of a draft by its tokens (a tree: constant).
        checking: seconds of the verifier's round over a tree; None for chains, which its own table tells.
        drawn: whether proposals are picked from a law with the noise of the text.
        blind_first: whether it offers nothing before the first pass above it.
    """

    drafts: list[Draft]
    seconds: SecondsTable
    checking: float | None = None
    drawn: bool = False
    blind_first: bool = False


@torch.no_grad()
def record_drafts(
    model: Any,
    drafter: Any,
    texts: Sequence[Text],
    readings: Sequence[Reading],
    law: Law,
    *,
    longest: int,
    tree: TreeSize | None = None,
    budget: float = 8.0,
    blind_first: bool = False,
    advance: Callable[[], None] = lambda: None,
) -> DraftRecord | None:
    """Let a drafter draft from places of every text, as it would below this model.

    Args:
        model: the verifier; drafter: EAGLE head, `Drafter` or candidate generator.
        texts: of the target; readings: of the model along them.
        law: of the plan.
        longest: most tokens of a draft.
        tree: size of the trees to grow instead of chains.
        budget: seconds to spend; starts are left out until it is met.
        blind_first: see `DraftRecord`.
        advance: called after each text.

    Returns:
        The record; None if trees were asked for and there are none.
    """
    chain = _chain(model, drafter, longest, tree)
    if chain is None:
        return None
    taker = _Taker(chain, law, tree.depth if tree else longest, tree is not None, budget / len(texts))
    drafts = []
    for text, reading in zip(texts, readings, strict=True):
        drafts.append(taker.along(text, reading))
        advance()
    times, checking = taker.times(texts)
    chain.end()
    return DraftRecord(drafts, times, checking, taker.drawn, blind_first)


@torch.no_grad()
def time_drafts(
    model: Any, drafter: Any, text: Text, law: Law, *, longest: int, tree: TreeSize | None = None, turns: int = 2
) -> tuple[SecondsTable, float | None]:
    """Only the `seconds` and `checking` of a `DraftRecord`.

    Args:
        model: the verifier; drafter, law, longest, tree: as for `record_drafts`.
        text: of the target; turns: rounds of each length.
    """
    chain = _chain(model, drafter, longest, tree)
    assert chain is not None, "trees were recorded under this model"
    taker = _Taker(chain, law, tree.depth if tree else longest, tree is not None, 1.0)
    taker.some(text)
    found = taker.times([text], turns)
    chain.end()
    return found


def _chain(model: Any, drafter: Any, longest: int, tree: TreeSize | None) -> Verifier | None:
    """A drafter below a model; None if trees are wanted and there are none."""
    sizes = {"num_assistant_tokens": longest}
    if tree is not None:
        sizes |= {"polyspec_tree_tokens": tree.tokens, "polyspec_tree_depth": tree.depth}
        sizes["polyspec_tree_top_k"] = tree.top_k
    chain = rig(model, [drafter], **sizes)
    return None if tree is not None and not chain.trees else chain


class _Forced:
    """A `Randomness` whose draws are the recorded text: a drafter then shows its law along it."""

    def __init__(self, tokens: Sequence[int]) -> None:
        self.tokens = list(tokens)
        self.place = 0

    def bernoulli(self, probability: torch.Tensor) -> torch.Tensor:
        return torch.rand(probability.shape, device=probability.device) < probability

    def categorical(self, weights: torch.Tensor) -> torch.Tensor:
        token = self.tokens[min(self.place, len(self.tokens) - 1)]
        self.place += 1
        return torch.full((weights.shape[0],), min(token, weights.shape[1] - 1), device=weights.device)


class _Behind(Noise):
    """The noise that may have been behind a text.

    Args:
        values: `[N, V]`.
    """

    def __init__(self, values: torch.Tensor) -> None:
        self.values = values

    def at(self, rows: Sequence[int], steps: Sequence[Sequence[int]]) -> list[list[torch.Tensor]]:
        return [[self.values[step] for step in wanted] for wanted in steps]


class _Taker:
    """Takes drafts along texts from one chain of two levels."""

    def __init__(self, chain: Verifier, law: Law, longest: int, trees: bool, budget: float) -> None:
        self.chain = chain
        self.law = law
        self.longest = longest
        self.trees = trees
        self.budget = budget
        self.drawn = False
        self.spent: list[float] = []

    def along(self, text: Text, reading: Reading) -> Draft:
        """Drafts at as many starts of a text as the budget allows, evenly spread."""
        below, count = self.chain.below, len(text.new)
        self._start(text)
        logs = np.full((count, self.longest), NEVER)
        columns, recorded = np.zeros(count), np.zeros(count, dtype=np.bool_)
        stride, start, judged = 1, 0, 0
        while start < count:
            before = below.stats.seconds
            tokens, row = self._take(text, reading, start)
            self.spent.append(below.stats.seconds - before)
            row = row[: self.longest]  # a tree that holds the text to its last depth is not refused after it
            logs[start, : len(row)], columns[start], recorded[start] = row, tokens, True
            if start >= judged and tokens and not self.trees:
                # A drafter that adapts hears what became of the drafts that a run along this text would make.
                kept = int((np.cumsum(row) == 0.0).sum()) if row.size else 0
                below.observe([int(tokens)], [kept])
                judged = start + kept + 1
            if len(self.spent) > 3:
                stride = max(1, min(8, math.ceil(statistics.fmean(self.spent) * count / self.budget)))
            start += stride
        return Draft(logs, columns, recorded)

    def _take(self, text: Text, reading: Reading, start: int) -> tuple[int, Array]:
        """Tokens offered from a start, and logs of chances by depth."""
        below, context = self.chain.below, text.context(start)
        # The verifier's own token takes the last place of a text.
        room = min(self.longest, len(text.new) - start - 1)
        if room < 1:
            return 0, np.zeros(0)
        if self.trees:
            stream = reading.stream[start : start + room].tolist()
            noise = None if reading.noise is None else _Behind(reading.noise.to(self.law.device))
            tree = below.propose_tree(context, [room], self.law.maker(noise=noise))
            return (0, np.zeros(0)) if tree is None else (len(tree.tokens[0]), depth_logs(tree, stream))
        forced = text.new[start : start + room]
        proposal = below.propose(context, [room], self.law.maker(_Forced(forced)))
        tokens = proposal.tokens[0]
        own = reading.stream[start : start + len(tokens)]
        if proposal.q is None or tokens != forced[: len(tokens)]:
            same = torch.tensor(tokens, dtype=torch.long) == own
            return len(tokens), np.where(same.numpy(), 0.0, NEVER)
        self.drawn = True
        return len(tokens), agreed(reading, start, proposal.q[0, : len(tokens)].float())

    def some(self, text: Text, count: int = 8) -> None:
        """A few drafts one after another, as a call makes them, whose results nobody looks at."""
        below, maker = self.chain.below, self.law.maker(noise=Resting(self.chain.vocabulary, self.law.device))
        self._start(text)
        for start in range(min(count + 1, len(text.new) - 1)):
            before = below.stats.seconds
            self._ask(text.context(start), self.longest, maker)
            if start:  # the first takes in the whole prompt
                self.spent.append(below.stats.seconds - before)

    def times(self, texts: Sequence[Text], turns: int = 6) -> tuple[SecondsTable, float | None]:
        """Seconds of a draft by its tokens, from real rounds; for trees also those of the verifier's round."""
        chain, below = self.chain, self.chain.below
        if not self._has_steps(below):
            return SecondsTable.constant(statistics.fmean(self.spent or [0.0])), None
        text = max(texts, key=lambda one: len(one.new))
        lengths = [self.longest] if self.trees else draft_lengths(self.longest)
        drafting: dict[int, list[float]] = {length: [] for length in lengths}
        checking = []
        maker = self.law.maker(noise=Resting(self.chain.vocabulary, self.law.device))
        self._start(text)
        chain.round(text.context(1), [2], maker)
        for turn in range(turns):
            start = min(len(text.new) - 1, 2 + 3 * turn)
            for length in lengths:
                before, own = below.stats.seconds, chain.stats.seconds
                chain.round(text.context(start), [length + 1], maker)
                drafting[length].append(below.stats.seconds - before)
                checking.append(chain.stats.seconds - own)
        points = tuple((length, statistics.median(found)) for length, found in drafting.items())
        if self.trees:
            return SecondsTable.constant(points[0][1]), statistics.median(checking)
        return SecondsTable(points), None

    def _start(self, text: Text) -> None:
        """A new text: nothing is remembered of another, and the level above has read all of it.

        It reads the prompt first and is asked for a draft behind it, as in a call: what a drafter makes of a prompt is
        not to be made of the text that it is to draft.
        """
        chain = self.chain
        chain.begin(0, 1, chain.vocabulary)
        chain.runner.adopt(empty_cache(chain.runner.model), [])
        chain.below.watch(chain.runner.run(text.context(0), [[]], LevelStats("reading", 0)))
        self._ask(text.context(0), 1, self.law.maker(noise=Resting(chain.vocabulary, self.law.device)))
        logits_along(chain, text)

    def _ask(self, context: Context, room: int, maker: LawMaker) -> None:
        """For a draft that nobody looks at."""
        below = self.chain.below
        (below.propose_tree if self.trees else below.propose)(context, [room], maker)

    @staticmethod
    def _has_steps(below: Drafter) -> bool:
        """Whether a longer draft takes longer: not so where nothing runs a model a token."""
        return below.stats.forward_passes > 0


def depth_logs(tree: TreeProposal, stream: Sequence[int]) -> Array:
    """Logs of chances by depth along a stream, as far as a tree holds it: 0; -inf at the next depth.

    Args:
        tree: of one row; stream: the tokens that the level above emits.
    """
    tokens, parents = tree.tokens[0], tree.parents[0]
    child = {(parent, token): node for node, (token, parent) in enumerate(zip(tokens, parents, strict=True))}
    node, depth = child.get((ROOT, stream[0])) if stream else None, 0
    while node is not None:
        depth += 1
        node = child.get((node, stream[depth])) if depth < len(stream) else None
    return np.array([0.0] * depth + [NEVER])
