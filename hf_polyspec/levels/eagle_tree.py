# SPDX-License-Identifier: Apache-2.0
"""Growing a tree with an EAGLE head (EAGLE-2, arXiv 2406.16858): follow the likeliest, then keep the likeliest."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypedDict

import torch

from ..exactness.tree_geometry import ROOT

Step = Callable[[torch.Tensor, torch.Tensor, int, torch.Tensor], torch.Tensor]
"""(tokens `[B, k]`, features `[B, k, H]`, depth, who sees which node fed so far `[B, k, N]`) -> `[B, k, H]`."""

Best = Callable[[torch.Tensor, int], tuple[torch.Tensor, torch.Tensor]]
"""(states `[B, n, H]`, k) -> log-probabilities and ids of the k likeliest tokens after each, `[B, n, k]`, float32."""


class Limits(TypedDict):
    """How far a tree grows, see `grow`."""

    top_k: int
    threshold: float
    ends: frozenset[int]


@dataclass(frozen=True)
class Grown:
    """Nodes per row in level order, with their parents."""

    tokens: list[list[int]]
    parents: list[list[int]]


@dataclass
class Pool:
    """All candidates so far, level after level: `[B, N]` each, with scores of -inf for those that are none."""

    tokens: torch.Tensor
    parents: torch.Tensor
    scores: torch.Tensor

    @classmethod
    def empty(cls, batch: int, device: torch.device) -> Pool:
        """Without candidates."""
        none = torch.empty(batch, 0, dtype=torch.long, device=device)
        return cls(none, none, torch.empty(batch, 0, device=device))

    def add(self, tokens: torch.Tensor, parents: torch.Tensor, scores: torch.Tensor) -> None:
        self.tokens = torch.cat([self.tokens, tokens], dim=1)
        self.parents = torch.cat([self.parents, parents], dim=1)
        self.scores = torch.cat([self.scores, scores], dim=1)


def grow(
    hidden: torch.Tensor,
    room: list[int],
    total: list[int],
    best: Best,
    step: Step,
    *,
    top_k: int,
    threshold: float = 0.0,
    ends: frozenset[int] = frozenset(),
) -> Grown:
    """A tree per row; one host synchronisation, with a threshold one a level.

    Nodes are chosen by what the head knows before the level above has judged any (law 2). Nothing is grown below an id
    that ends the text.

    Args:
        hidden: `[B, 1, H]`, the head's output after the context.
        room: longest path per row, 0 for rows that need nothing.
        total: nodes kept per row.
        best: finds the likeliest continuations of each state.
        step: runs the head on one level.
        top_k: nodes expanded a level, and continuations tried of each.
        threshold: 0 to 1; a row grows no further level once its likeliest path to the last one is less probable. The
            first level is always there.
        ends: ids that end a text.
    """
    scores, tokens = (values[:, 0] for values in best(hidden, top_k))  # [B, k]
    width = tokens.shape[1]
    limits = torch.tensor(room, device=scores.device)[:, None]
    ending = torch.tensor(sorted(ends), dtype=torch.long, device=tokens.device)
    scores = scores.masked_fill(limits < 1, float("-inf"))
    pool = Pool.empty(len(room), tokens.device)
    pool.add(tokens, torch.full_like(tokens, ROOT), scores)
    front = torch.arange(width, device=tokens.device).expand_as(tokens)  # places in the pool
    own = torch.eye(width, dtype=torch.bool, device=tokens.device).expand(len(room), -1, -1)
    features, sees = hidden.expand(-1, width, -1), own
    # What is expanded: -inf for nodes that are not.
    scores = scores.masked_fill(torch.isin(tokens, ending), float("-inf"))
    for level in range(1, max(room)):
        if threshold > 0:
            limits = unsure(limits, scores, threshold, level)
            if not bool((limits > level).any()):
                break
        out = step(tokens, features, level, sees)  # [B, k, H]
        more, candidates = best(out, width)  # [B, k, k]
        summed = (scores[:, :, None] + more).flatten(1).masked_fill(limits < level + 1, float("-inf"))  # [B, k * k]
        start = pool.tokens.shape[1]
        candidates = candidates.flatten(1)
        pool.add(candidates, front[:, :, None].expand(-1, -1, width).flatten(1), summed)
        going = summed.masked_fill(torch.isin(candidates, ending), float("-inf"))
        scores, chosen = going.topk(width, dim=-1)  # [B, k] places among the candidates
        front = start + chosen
        tokens = candidates.gather(1, chosen)
        of_parent = chosen // width  # [B, k] place of the parent among the level just run
        features = out.gather(1, of_parent[:, :, None].expand(-1, -1, out.shape[2]))
        inherited = sees.gather(1, of_parent[:, :, None].expand(-1, -1, sees.shape[2]))
        sees = torch.cat([inherited, own], dim=2)
    return best_nodes(pool, total)[0]


def first_in_race(arrivals: torch.Tensor, ids: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The ids that arrive first after each node, and the logs of their chances to be what the level above picks.

    The chance of an id is taken to be in proportion to how early it arrives, q / e. It would be so if the log ratio of
    the two laws were a Gumbel variable of the scale of the noise. A law surer of the first (its second power) or less
    sure (its root) made trees of the head that ships worth 8 and 5 % less.

    Args:
        arrivals: `[B, n, N]`, `LawMaker.race` under the head's law: the law itself for rows whose text is not drawn;
            ids: `[N]`, what its columns stand for.
        count: how many are wanted; fewer where there are no more ids.

    Returns:
        Two of `[B, n, min(count, N)]`; -inf for ids that the head holds impossible.
    """
    chances = arrivals.log()
    values, columns = chances.topk(min(count, chances.shape[-1]), dim=-1)
    return values - chances.logsumexp(-1, keepdim=True), ids[columns]


def unsure(limits: torch.Tensor, scores: torch.Tensor, threshold: float, level: int) -> torch.Tensor:
    """Room `[B, 1]` of the rows, cut to `level` where the likeliest node to expand is less probable than allowed."""
    sure = scores.amax(dim=1, keepdim=True) >= math.log(threshold)
    return torch.where(sure, limits, limits.clamp(max=level))


def best_nodes(pool: Pool, total: list[int]) -> tuple[Grown, list[list[int]]]:
    """The likeliest nodes of each row, in level order, and their places in the pool.

    The pool is in level order and a child is never likelier than its parent, so a stable sort takes parents first:
    what is kept is closed under ancestors, ties included.
    """
    order = pool.scores.sort(dim=1, descending=True, stable=True).indices[:, : max(total)]
    places = order.sort(dim=1).values  # [B, N]
    rank = torch.arange(order.shape[1], device=order.device).expand_as(order)
    within = rank < torch.tensor(total, device=order.device)[:, None]
    within = within.gather(1, order.argsort(dim=1))  # by place instead of by rank
    usable = torch.isfinite(pool.scores.gather(1, places)) & within
    packed = torch.stack([places, pool.tokens.gather(1, places), pool.parents.gather(1, places), usable.long()])
    tokens: list[list[int]] = []
    parents: list[list[int]] = []
    found: list[list[int]] = []
    for at, ids, above, possible in zip(*packed.tolist(), strict=True):
        kept = [i for i, alive in enumerate(possible) if alive]
        number = {ROOT: ROOT} | {at[i]: new for new, i in enumerate(kept)}
        tokens.append([ids[i] for i in kept])
        parents.append([number[above[i]] for i in kept])
        found.append([at[i] for i in kept])
    return Grown(tokens, parents), found
