# SPDX-License-Identifier: Apache-2.0
"""What drafters offer along text the target wrote, and how long they take for it; see `readings` for the ratios."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ..cache import RollbackCache
from ..distributions import LawMaker
from ..levels.base import Drafter, TreeProposal
from ..levels.verifier import Verifier
from ..trees import ROOT
from .cost_model import SecondsTable
from .costs import draft_lengths
from .readings import NEVER, Array, Reading, logits_along
from .rig import rig
from .texts import Law, Text

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
        ratios: `[N, K]` log of q / p at depth j of the draft that starts at position t; -inf where nothing was offered.
        columns: `[N]` tokens offered (a tree: nodes).
        recorded: `[N]` whether a draft was made there; the other rows mean nothing.
    """

    ratios: Array
    columns: Array
    recorded: Flags


@dataclass(frozen=True)
class DraftRecord:
    """A drafter under one verifier.

    Attributes:
        drafts: one a text.
        seconds: of a draft by its tokens (a tree: constant).
        checking: seconds of the verifier's round over a tree; None for chains, which its own table tells.
        drawn: whether proposals come with the law they were drawn from, so that block verification applies.
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


class Along(LawMaker):
    """A law maker for trees that follows a text: what a level of a tree draws is the text's token there."""

    def __init__(self, maker: LawMaker, tokens: Sequence[int]) -> None:
        super().__init__(maker.processors, maker.do_sample, maker.device)
        self.left = list(tokens)

    def draw_ids(self, weights: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        token = self.left.pop(0) if self.left else 0
        return torch.full((weights.shape[0],), token, device=ids.device)


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
        ratios = np.full((count, self.longest), NEVER)
        columns, recorded = np.zeros(count), np.zeros(count, dtype=np.bool_)
        stride, start, judged = 1, 0, 0
        while start < count:
            before = below.stats.seconds
            tokens, row = self._take(text, reading, start)
            self.spent.append(below.stats.seconds - before)
            row = row[: self.longest]  # a tree that holds the text to its last depth is not refused after it
            ratios[start, : len(row)], columns[start], recorded[start] = row, tokens, True
            if start >= judged and tokens and not self.trees:
                # A drafter that adapts hears what became of the drafts that a run along this text would make.
                kept = int((np.cumsum(row) == 0.0).sum()) if row.size else 0
                below.observe([int(tokens)], [kept])
                judged = start + kept + 1
            if len(self.spent) > 3:
                stride = max(1, min(8, math.ceil(statistics.fmean(self.spent) * count / self.budget)))
            start += stride
        return Draft(ratios, columns, recorded)

    def _take(self, text: Text, reading: Reading, start: int) -> tuple[int, Array]:
        """Tokens offered from a start, and log ratios by depth."""
        below, context = self.chain.below, text.context(start)
        # The verifier's own token takes the last place of a text.
        room = min(self.longest, len(text.new) - start - 1)
        if room < 1:
            return 0, np.zeros(0)
        if self.trees:
            maker = Along(self.law.maker(), reading.stream[start : start + room].tolist())
            tree = below.propose_tree(context, [room], maker)
            return (0, np.zeros(0)) if tree is None else (len(tree.tokens[0]), depth_ratios(tree, reading, start))
        forced = text.new[start : start + room]
        proposal = below.propose(context, [room], self.law.maker(_Forced(forced)))
        tokens = proposal.tokens[0]
        own = reading.stream[start : start + len(tokens)]
        if proposal.q is None or tokens != forced[: len(tokens)]:
            same = torch.tensor(tokens, dtype=torch.long) == own
            return len(tokens), np.where(same.numpy(), 0.0, NEVER)
        self.drawn = True
        q = proposal.q[0, : len(tokens)].float().cpu()
        at = q.gather(1, own.clamp(max=q.shape[1] - 1)[:, None]).squeeze(1).double().log()
        ratio = at - reading.own()[start : start + len(tokens)].double().log()
        return len(tokens), np.asarray(ratio.numpy(), dtype=np.float64)

    def some(self, text: Text, count: int = 8) -> None:
        """A few drafts one after another, as a call makes them, whose results nobody looks at."""
        below, maker = self.chain.below, self.law.maker()
        self._start(text)
        for start in range(min(count + 1, len(text.new) - 1)):
            before = below.stats.seconds
            (below.propose_tree if self.trees else below.propose)(text.context(start), [self.longest], maker)
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
        maker = self.law.maker()
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
        """A new text: nothing is remembered of another, and the level above has read all of it."""
        self.chain.begin(0, 1, self.chain.vocabulary)
        self.chain.runner.adopt(RollbackCache(), [])
        logits_along(self.chain, text)

    @staticmethod
    def _has_steps(below: Drafter) -> bool:
        """Whether a longer draft takes longer: not so where nothing runs a model a token."""
        return below.stats.forward_passes > 0


def depth_ratios(tree: TreeProposal, reading: Reading, start: int) -> Array:
    """Log ratios by depth along the stream, as far as a tree holds it; -inf at the next depth.

    A token that a chosen child holds is kept, ratio 1. One that a drawn child holds is kept with probability
    min(1, r / p'), r being what the child was drawn from and p' the law without the chosen children.

    Args:
        tree: of one row, its drawn children on the stream holding the stream's tokens.
        reading: of the model that checks it; start: where in its text.
    """
    tokens, parents = tree.tokens[0], tree.parents[0]
    drawn = {parents[node]: (node, place) for place, node in enumerate(tree.drawn[0] if tree.drawn else [])}
    tried = {node for node, _ in drawn.values()}
    chosen: dict[int, dict[int, int]] = {}
    for node, (token, parent) in enumerate(zip(tokens, parents, strict=True)):
        if node not in tried:
            chosen.setdefault(parent, {})[token] = node
    node, found = ROOT, []
    for depth, token in enumerate(reading.stream[start:-1].tolist()):
        beside = chosen.get(node, {})
        if token in beside:
            node = beside[token]
            found.append(0.0)
        elif node in drawn and tree.q is not None and token < tree.q.shape[2]:
            node, place = drawn[node]
            p = reading.laws[start + depth].double()
            rest = float(p[token]) / max(1e-12, 1 - float(p[list(beside)].sum()))
            r = float(tree.q[0, place, token])
            if not r > 0 or tokens[node] != token:
                break
            found.append(math.log(r / rest))
        else:
            break
    return np.array([*found, NEVER])
