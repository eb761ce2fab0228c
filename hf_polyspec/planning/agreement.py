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
from torch.nn import functional

from ..exactness.distributions import LawMaker
from ..exactness.proposal import TreeProposal
from ..exactness.tree_geometry import ROOT
from ..host.cache import RollbackCache
from ..levels.base import Drafter
from ..levels.verifier import Verifier
from .costs import draft_lengths
from .readings import NEVER, Array, Reading, logits_along
from .rig import rig
from .texts import Law, Text
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
    """A law maker for trees that follows a text: on its way, one of a node's children is the text's next token.

    Which one is drawn as a check would find it, given that the check emits that token; those before it are ids that it
    rejects.

    Args:
        maker: of the plan's laws.
        tokens: the text; laws: `[n, V]`, what its tokens are drawn from by the level that checks.

    Attributes:
        ratios: log of how likely the text's token is followed if the check emits it, by depth.
    """

    def __init__(self, maker: LawMaker, tokens: Sequence[int], laws: torch.Tensor) -> None:
        super().__init__(maker.processors, maker.do_sample, maker.device, maker.randomness)
        self.tokens, self.laws = list(tokens), laws
        self.ratios: list[float] = []
        self._at: int | None = ROOT  # the text's node, by its place among all children drawn so far
        self._before = 0  # children drawn so far

    def draw_distinct(
        self, weights: torch.Tensor, ids: torch.Tensor, counts: torch.Tensor, nodes: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        depth, width = len(self.ratios), max(1, int(counts.max()))
        row = next((row for row, node in enumerate(nodes.tolist()) if node == self._at), None)
        self._at, forced = None, None
        if row is not None and depth < len(self.tokens):
            columns = (ids == self.tokens[depth]).nonzero().flatten().tolist()
            p, r = self.laws[depth].to(ids.device)[ids].double(), weights[row].double()
            forced = self._followed(p, r, columns[0], int(counts[row])) if columns else None
        if row is None or forced is None:
            drawn, laws = super().draw_distinct(weights, ids, counts, nodes)
        else:
            place, children, ratio = forced
            self.ratios.append(ratio)
            self._at = self._before + row * width + place
            others = counts.index_fill(0, torch.tensor([row], device=counts.device), 0)
            drawn, laws = super().draw_distinct(weights, ids, others, nodes)
            missing = width - drawn.shape[1]
            drawn, laws = functional.pad(drawn, (0, missing)), functional.pad(laws, (0, 0, 0, missing))
            drawn[row, : len(children)] = ids[children]
        self._before += drawn.numel()
        return drawn, laws

    def _followed(
        self, p: torch.Tensor, r: torch.Tensor, column: int, count: int
    ) -> tuple[int, list[int], float] | None:
        """Which of a node's children is the text's token, all of them, and the log ratio; None if none can be.

        Args:
            p, r: `[N]`, laws of the check and of the drafter; column: the token's; count: how many children there are.
        """
        weight, reached, left = float(p[column]), 1.0, r
        rejected, chances = list[int](), list[float]()
        while len(chances) < count:
            left = left / left.sum()
            common = torch.minimum(p, left)
            chances.append(reached * float(common[column]))
            reached *= float(1 - common.sum())
            refused = left - common
            if len(chances) == count or reached <= 0 or not float(refused.sum()) > 0:
                break
            rejected.append(int(self.draw(refused[None])))
            p, left = (p - common) / (1 - common.sum()), left.clone()
            left[rejected[-1]] = 0
        if not sum(chances) > 0:
            return None
        place = int(self.draw(torch.tensor([chances], dtype=torch.float64, device=p.device)))
        children = [*rejected[:place], column]
        while len(children) < count:
            rest = r.clone()
            rest[children] = 0
            children.append(int(self.draw(rest[None])))
        return place, children, math.log(sum(chances) / weight)


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
            stream, laws = reading.stream[start : start + room].tolist(), reading.laws[start : start + room]
            maker = Along(self.law.maker(), stream, laws)
            tree = below.propose_tree(context, [room], maker)
            if tree is None:
                return 0, np.zeros(0)
            drawn = any(tree.drawn)
            return len(tree.tokens[0]), np.array([*maker.ratios, NEVER]) if drawn else depth_ratios(tree, stream)
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


def depth_ratios(tree: TreeProposal, stream: Sequence[int]) -> Array:
    """Log ratios by depth along a stream, as far as a tree of chosen nodes holds it: 0; -inf at the next depth.

    Args:
        tree: of one row, nothing of it drawn; stream: the tokens that the level above emits.
    """
    tokens, parents = tree.tokens[0], tree.parents[0]
    child = {(parent, token): node for node, (token, parent) in enumerate(zip(tokens, parents, strict=True))}
    node, depth = child.get((ROOT, stream[0])) if stream else None, 0
    while node is not None:
        depth += 1
        node = child.get((node, stream[depth])) if depth < len(stream) else None
    return np.array([0.0] * depth + [NEVER])
