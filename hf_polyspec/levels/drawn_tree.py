# SPDX-License-Identifier: Apache-2.0
"""Growing a tree for a verifier that samples: children are drawn from the head's law without replacement.

A child that was chosen is worth the target's probability of it, which is little where the target's law is flat; one
drawn from the head's law r is worth sum_x min(p, r), the rule of speculative sampling. After a rejection the next
child, drawn from what the first leaves of r, is judged against what it leaves of p (recursive rejection sampling
without replacement: Jeon et al. 2024, arXiv 2402.14160; Chen et al. 2024, arXiv 2402.12374).

How many children the nodes of a level get follows from the head's laws before any of them is drawn, and no node is
dropped afterwards (law 2). How many nodes the levels to come will be worth can therefore only be estimated.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch

from ..exactness.tree_geometry import ROOT
from .eagle_tree import Grown, Pool, Step, best_nodes, unsure

Guess = Callable[[torch.Tensor], torch.Tensor]
"""States `[B, n, H]` -> the law to draw from after each: `[B, n, N]` in float32."""

Draw = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
"""`LawMaker.draw_distinct`. Nodes are known by their place in the pool; those of a level's children follow all before
them, K for each of its nodes."""

_CHILDREN = (0.47, 0.12, 0.07, 0.04, 0.03)
"""Chances of a node's children, on average."""

_LOOKED_AT = 64
"""Descendants of a node that are reckoned with."""

_NOTHING = 1e-30
"""What is left of a law when nothing can be drawn from it."""


@dataclass(frozen=True)
class DrawnNodes:
    """Which nodes of a tree were drawn, and from what.

    Attributes:
        nodes: per row, in order.
        laws: `[B, D, N]`, row i of it what the row's i-th drawn node was drawn from.
    """

    nodes: list[list[int]]
    laws: torch.Tensor


@dataclass(frozen=True)
class _Front:
    """Nodes to be given children; those that are none have a score of -inf.

    Attributes:
        scores: `[B, w]`, log of the chance that the text goes through them.
        places: `[B, w]`, theirs in the pool.
        out: `[B, w, H]`, the head's output after them.
        sees: `[B, w, F]`, which of the nodes fed so far are on their paths.
    """

    scores: torch.Tensor
    places: torch.Tensor
    out: torch.Tensor
    sees: torch.Tensor


@dataclass(frozen=True)
class _Level:
    """The children of the nodes of a front, at most K each.

    Attributes:
        tokens: `[B, w, K]`.
        scores: `[B, w, K]`, as those of a front; -inf for children that are not had.
        laws: `[B, w, K, N]`, what they were drawn from.
    """

    tokens: torch.Tensor
    scores: torch.Tensor
    laws: torch.Tensor


def grow_drawn(
    hidden: torch.Tensor,
    room: list[int],
    total: list[int],
    guess: Guess,
    ids: torch.Tensor,
    step: Step,
    draw: Draw,
    *,
    top_k: int,
    threshold: float = 0.0,
    ends: frozenset[int] = frozenset(),
) -> tuple[Grown, DrawnNodes]:
    """A tree per row.

    Args:
        hidden, room, total, step, threshold, ends: as for `grow`.
        guess: the head's laws; ids: `[N]`, what their columns stand for.
        draw: from laws to ids.
        top_k: nodes given children a level, and most children of each.
    """
    batch, device, deepest = len(room), ids.device, max(room)
    limits = torch.tensor(room, device=device)[:, None]
    left = torch.tensor(total, device=device)[:, None]  # [B, 1], nodes still to be had
    ending = torch.tensor(sorted(ends), dtype=torch.long, device=device)
    pool = Pool.empty(batch, device)
    laws = [torch.empty(batch, 0, len(ids), device=device)]  # of each place in the pool
    front = _Front(
        torch.zeros(batch, 1, device=device),
        torch.full((batch, 1), ROOT, device=device),
        hidden,
        torch.zeros(batch, 1, 0, dtype=torch.bool, device=device),
    )
    for level in range(deepest):
        if level and threshold > 0:
            limits = unsure(limits, front.scores, threshold, level)
        scores = front.scores.masked_fill(limits <= level, float("-inf"))
        if not bool(torch.isfinite(scores).any()):
            break
        to_come = [longest - level - 1 for longest in room]
        found = _children(scores, front.places, guess(front.out), ids, left, to_come, draw, top_k)
        left = left - torch.isfinite(found.scores).flatten(1).sum(1, keepdim=True)
        start, children = pool.tokens.shape[1], found.tokens.shape[2]
        pool.add(found.tokens.flatten(1), front.places.repeat_interleave(children, dim=1), found.scores.flatten(1))
        laws.append(found.laws.flatten(1, 2))
        if level + 1 < deepest:
            front = _next_front(front, found, start, step, level + 1, ending, top_k)
    grown, places = best_nodes(pool, total)
    return grown, DrawnNodes([list(range(len(row))) for row in places], _laws_of(torch.cat(laws, dim=1), places))


def _children(
    scores: torch.Tensor,
    places: torch.Tensor,
    law: torch.Tensor,
    ids: torch.Tensor,
    left: torch.Tensor,
    levels: list[int],
    draw: Draw,
    top_k: int,
) -> _Level:
    """Decides how many children the nodes of a front get, then draws them.

    Args:
        scores, places: `[B, w]`, of the front; law: `[B, w, N]`; ids: `[N]`.
        left: `[B, 1]`, nodes still to be had; levels: per row, how many levels are to come.
        draw, top_k: as for `grow_drawn`.
    """
    batch, width, size = law.shape
    chances = _chances(law, min(top_k, size)).log() + scores[:, :, None]
    kept = _worth_having(chances, left, levels)  # [B, w, K]; a node's first children are its likeliest
    counts = kept.sum(-1)
    tokens, laws = draw(law.flatten(0, 1), ids, counts.flatten(), places.flatten())
    had = tokens.shape[1]
    chances = chances.masked_fill(~kept, float("-inf"))[..., :had]
    return _Level(tokens.view(batch, width, had), chances, laws.view(batch, width, had, size))


def _chances(law: torch.Tensor, most: int) -> torch.Tensor:
    """How likely each of a node's children is the one that is followed, `[B, w, most]`; 0 where none can be drawn.

    The later a child is drawn, the likelier one before it is followed, and the less of the target's law is left
    within the head's. Measured with the head that is shipped, given that those before it were rejected: a child is
    accepted the more often the more weight the head's likeliest id has.

    Args:
        law: `[B, w, N]`, what is drawn from.
    """
    best = law.topk(most, dim=-1).values  # [B, w, K]
    place = torch.arange(most, device=law.device)
    after = (place - 1).clamp(min=0)
    later = 0.1 / (after + 1).sqrt() + 0.36 * 0.68**after * best[..., :1]
    accepted = torch.where(place == 0, 0.25 + 0.64 * best[..., :1], later)  # [B, w, K]
    reached = torch.cat([torch.ones_like(best[..., :1]), (1 - accepted).cumprod(-1)[..., :-1]], dim=-1)
    # whatever is drawn before a child, at least so much is left to draw it from
    beyond = law.sum(-1, keepdim=True) - best.sum(-1, keepdim=True)
    least = best.flip(-1).cumsum(-1).flip(-1) + beyond.clamp(min=0)
    return torch.where(least > _NOTHING, accepted * reached, 0.0)


def _worth_having(gains: torch.Tensor, left: torch.Tensor, levels: list[int]) -> torch.Tensor:
    """Which children to have now, so that what is left suffices for as good ones on the levels to come.

    The levels to come are taken to be what they are on average: every node of this one brings `_descendants`.

    Args:
        gains: `[B, w, K]`, logs; left: `[B, 1]`; levels: per row, how many are to come.
    """
    flat = gains.flatten(1)  # [B, M]
    to_come = torch.tensor([_descendants(max(0, count)) for count in levels], device=flat.device).log()
    among = (flat[:, :, None] + to_come[:, None]).flatten(1).sort(dim=1, descending=True).values
    least = among.gather(1, (left - 1).clamp(min=0, max=among.shape[1] - 1))
    rank = flat.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    return ((flat >= least) & torch.isfinite(flat) & (rank < left)).view_as(gains)


@cache
def _descendants(levels: int) -> tuple[float, ...]:
    """Chances of a node and of the best of those below it on so many levels, on average, relative to its own.

    Always as many, filled with zeros.
    """
    found, level = [1.0], [1.0]
    for _ in range(levels):
        level = sorted((a * b for a, b in itertools.product(level, _CHILDREN)), reverse=True)[:_LOOKED_AT]
        found += level
    return tuple((sorted(found, reverse=True) + [0.0] * _LOOKED_AT)[:_LOOKED_AT])


def _next_front(
    front: _Front, found: _Level, start: int, step: Step, level: int, ending: torch.Tensor, top_k: int
) -> _Front:
    """The likeliest of a level's nodes, run through the head; none below an end of text.

    Args:
        front: the nodes above; found: their children, which begin at `start` in the pool.
        step: runs the head on them, as on `level`; ending: ids that end a text; top_k: most of them.
    """
    tokens, children = found.tokens.flatten(1), found.tokens.shape[2]
    going = found.scores.flatten(1).masked_fill(torch.isin(tokens, ending), float("-inf"))
    scores, chosen = going.topk(min(top_k, going.shape[1]), dim=-1)  # [B, w], places among the level's
    above = (chosen // children)[:, :, None]
    features = front.out.gather(1, above.to(front.out.device).expand(-1, -1, front.out.shape[2]))
    own = torch.eye(chosen.shape[1], dtype=torch.bool, device=chosen.device).expand(len(chosen), -1, -1)
    sees = torch.cat([front.sees.gather(1, above.expand(-1, -1, front.sees.shape[2])), own], dim=2)
    return _Front(scores, start + chosen, step(tokens.gather(1, chosen), features, level, sees), sees)


def _laws_of(laws: torch.Tensor, places: list[list[int]]) -> torch.Tensor:
    """`[B, D, N]`: per row the laws of its nodes, by their places in the pool; shorter rows are filled with zeros."""
    found = laws.new_zeros(len(places), max(len(row) for row in places), laws.shape[2])
    for b, row in enumerate(places):
        found[b, : len(row)] = laws[b, row]
    return found
