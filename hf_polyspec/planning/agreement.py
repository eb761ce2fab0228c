# SPDX-License-Identifier: Apache-2.0
"""How much of what one level offers another would keep, recorded on text the target wrote.

Everything is a ratio q(y) / p(y) along the recorded text: q of the level that offers, p of the level that checks, both
after the tokens before y. Given that a verifier's stream runs along y, the chance that it *accepted* the first i of
those tokens rather than drew them itself is

    token verification:  product of min(1, q_j / p_j), j <= i
    block verification:  min(1, r_1, r_1 r_2, ..., r_1 ... r_i),  r_j = q_j / p_j

The first is Leviathan's rule read backwards: min(p, q)(y) = p(y) min(1, q(y) / p(y)). The second follows from
P(accepted >= i | x_1..x_i) = P_i, the capped running ratio of Sun et al. 2024 (arXiv 2403.10444), times q(x_1..x_i).
Neither needs a coin, and one text serves every draft length and block size. In the greedy limit, and for proposals
that nobody drew, a ratio is 1 where the token is the same and 0 elsewhere.

A middle's own stream is coupled to the text: its token is y with probability min(1, p_m(y) / p_0(y)), else a draw from
the residual max(p_m - p_0, 0). After the first token that differs, its rounds are taken to go on as along the text.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ..cache import RollbackCache
from ..distributions import fit_vocabulary
from ..levels.base import Drafter, TreeProposal
from ..levels.verifier import Verifier
from ..telemetry import LevelStats
from ..trees import ROOT
from .cost_model import SecondsTable
from .costs import draft_lengths
from .rig import Offer, rig
from .texts import Law, Text, context_of

Array = np.ndarray[Any, np.dtype[np.float64]]
Flags = np.ndarray[Any, np.dtype[np.bool_]]
NEVER = -math.inf


@dataclass(frozen=True)
class TreeSize:
    """Of the trees an EAGLE head grows: nodes kept, longest path, nodes followed at each depth."""

    tokens: int
    depth: int
    top_k: int


TREES = (TreeSize(6, 3, 3), TreeSize(12, 4, 4), TreeSize(24, 5, 6))


@dataclass(frozen=True)
class Reading:
    """One model along one text.

    Attributes:
        laws: `[N, V]` its law at each of the N new positions; one-hot in the greedy limit.
        stream: `[N]` its own token there, coupled to the text.
    """

    laws: torch.Tensor
    stream: torch.Tensor

    def own(self) -> torch.Tensor:
        """`[N]`: the probability of its own token."""
        return self.laws.gather(1, self.stream[:, None]).squeeze(1)


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


def survival(ratios: Array, block: bool) -> Array:
    """P(at least i + 1 tokens accepted) given the text, `[N, K]`, from log ratios `[N, K]`.

    Args:
        ratios: log of q / p by start and depth.
        block: block verification, else token by token; the same where every ratio is 0 or -inf.
    """
    if ratios.shape[1] == 0:
        return np.zeros(ratios.shape)
    if block:
        logs = np.minimum(0.0, np.minimum.accumulate(np.cumsum(ratios, axis=1), axis=1))
    else:
        logs = np.cumsum(np.minimum(0.0, ratios), axis=1)
    return np.asarray(np.exp(logs), dtype=np.float64)


def windows(along: Array, width: int) -> Array:
    """`[N, K]` from `[N]`: entry (t, j) is that of position t + j.

    The last position of a text is never proposed: it is the verifier's own token.
    """
    padded = np.concatenate([along[:-1], np.full(width + 1, NEVER)])
    return np.array(np.lib.stride_tricks.sliding_window_view(padded, width)[: len(along)], dtype=np.float64)


@torch.no_grad()
def read_model(
    model: Any, text: Text, law: Law, target: Reading | None, generator: torch.Generator, lender: Any = None
) -> Reading:
    """A model's laws along a text, and its stream coupled to the target's.

    Args:
        model: causal LM; text: of the target; law: what its logits become.
        target: the target's own reading, None if this is it; generator: of the coupling.
        lender: the model that lends this one its reading of the prompt in a chain (see `lending`), or None.
    """
    chain = rig(model, [Offer()])
    if lender is not None and len(text.prompt) > 1:
        lends = rig(lender, [Offer()]).runner
        lends.run(context_of([text.prompt[:-1]], len(text.prompt) - 1), [[]], LevelStats("reading", 0))
        chain.runner.lender = lends
    return reading_of(_pass(chain, text), text, law, target, generator)


def reading_of(
    logits: torch.Tensor, text: Text, law: Law, target: Reading | None, generator: torch.Generator
) -> Reading:
    """Logits `[1, N + 1, V]` along a text as a `Reading`."""
    maker = law.maker()
    scores = maker.scores(text.context(0), [text.new], logits)[0, :-1].float().cpu()  # [N, V]
    new = torch.tensor(text.new)
    if not law.do_sample:
        best = scores.argmax(-1)
        return Reading(torch.nn.functional.one_hot(best, scores.shape[1]).float(), new if target is None else best)
    laws = scores.softmax(-1)
    if target is None:
        return Reading(laws, new)
    reference = fit_vocabulary(target.laws, laws.shape[1])
    known = new < laws.shape[1]  # an assistant's vocabulary may have fewer rows than the target's
    keep = laws.gather(1, new.clamp(max=laws.shape[1] - 1)[:, None]).squeeze(1) * known / target.own()
    stays = torch.rand(len(new), generator=generator) < keep
    residual = (laws - reference.clamp(min=0)).clamp(min=0)
    residual = torch.where(residual.sum(-1, keepdim=True) > 0, residual, laws)
    drawn = torch.multinomial(residual, 1, generator=generator).squeeze(1)
    return Reading(laws, torch.where(stays, new, drawn))


def edge(above: Reading, below: Reading) -> Array:
    """`[N]` log of q / p along the stream of the level above, q of the level below."""
    size = below.laws.shape[1]
    known = above.stream < size
    q = below.laws.gather(1, above.stream.clamp(max=size - 1)[:, None]).squeeze(1) * known
    own = above.own()
    # In the greedy limit the target's text is its own argmax but for ties between kernels: count it as its choice.
    ratio = q.double().log() - torch.where(own > 0, own, 1.0).double().log()
    return np.asarray(ratio.numpy(), dtype=np.float64)


def agreement_rate(ratios: Sequence[Array]) -> float:
    """Mean probability that a token is accepted: sum of min(p, q), estimated along the text."""
    joined = np.concatenate(list(ratios))
    return float(np.exp(np.minimum(0.0, joined)).mean())


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


def _pass(chain: Verifier, text: Text) -> torch.Tensor:
    passed = chain.runner.run(text.context(0), [text.new], LevelStats("reading", 0))
    chain.below.watch(passed)
    return fit_vocabulary(passed.logits, chain.vocabulary)


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
            tree = below.propose_tree(context, [room], self.law.maker())
            return (0, np.zeros(0)) if tree is None else (len(tree.tokens[0]), _depth_reached(tree, reading, start))
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
        _pass(self.chain, text)

    @staticmethod
    def _has_steps(below: Drafter) -> bool:
        """Whether a longer draft takes longer: not so where nothing runs a model a token."""
        return below.stats.forward_passes > 0


def _depth_reached(tree: TreeProposal, reading: Reading, start: int) -> Array:
    """0 for every depth at which the tree holds the stream's token, as far as it does; -inf at the next."""
    children = {
        (parent, token): node for node, (token, parent) in enumerate(zip(tree.tokens[0], tree.parents[0], strict=True))
    }
    node, depth = ROOT, 0
    stream = reading.stream[start:].tolist()
    while depth < len(stream) - 1 and (node, stream[depth]) in children:
        node = children[node, stream[depth]]
        depth += 1
    return np.concatenate([np.zeros(depth), [NEVER]])
