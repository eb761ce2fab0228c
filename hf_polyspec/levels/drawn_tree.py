# SPDX-License-Identifier: Apache-2.0
"""Growing a tree for a verifier that samples: likely children are chosen, one more is drawn from what they leave.

A chosen child is worth the target's probability of it, which is little where the target's law is flat. A child drawn
from the head's law r over all ids but the chosen ones is worth sum_x min(p', r), p' being the target's law over the
same ids: the rule of speculative sampling. So a drawn child is worth several chosen ones at high temperatures, and next
to nothing where a few ids have all the weight. Some chosen children and one drawn are close to the best that any rule
makes of as many (Hu et al. 2025, arXiv 2502.18779).

Which children the nodes of a level get follows from the head's laws before any of them is drawn, and no node is dropped
afterwards (law 2). How many nodes the levels to come will be worth can therefore only be estimated.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch

from ..trees import ROOT
from .eagle_tree import Grown, Pool, Step, best_nodes, unsure

Guess = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
"""States `[B, n, H]` -> after each, what the head thinks likely, and the law to draw from: `[B, n, N]` in float32."""

Draw = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""(weights `[R, N]`, ids `[N]`) -> one id a row, `[R]`."""

_CHILDREN = (0.35, 0.2, 0.1, 0.05, 0.03)
"""Chances of a node's best children, on average."""

_LOOKED_AT = 64
"""Descendants of a node that are reckoned with."""

_NOTHING = 1e-6
"""What is left of a law when only rounding is."""


@dataclass(frozen=True)
class DrawnNodes:
    """Which nodes of a tree were drawn, and from what.

    Attributes:
        nodes: per row, in order; at most one child of each node.
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
    """The children that the nodes of a front may get: of each K chosen ones and, last, a drawn one.

    Attributes:
        tokens: `[B, w, K + 1]`.
        scores: `[B, w, K + 1]`, as those of a front; -inf for children that are not had.
        laws: `[B, w, N]`, what the drawn ones were drawn from.
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
        top_k: nodes given children a level, and most chosen children of each.
    """
    batch, device, deepest = len(room), ids.device, max(room)
    limits = torch.tensor(room, device=device)[:, None]
    left = torch.tensor(total, device=device)[:, None]  # [B, 1], nodes still to be had
    ending = torch.tensor(sorted(ends), dtype=torch.long, device=device)
    pool = Pool.empty(batch, device)
    laws: list[torch.Tensor] = []
    slots: list[int] = []  # of each place in the pool, where its law is among all; -1 for chosen nodes
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
        found = _children(scores, guess(front.out), ids, left, [longest - level - 1 for longest in room], draw, top_k)
        left = left - torch.isfinite(found.scores).flatten(1).sum(1, keepdim=True)
        start, width, children = pool.tokens.shape[1], *found.tokens.shape[1:]
        first = sum(law.shape[1] for law in laws)
        slots += [first + node if child == children - 1 else -1 for node in range(width) for child in range(children)]
        pool.add(found.tokens.flatten(1), front.places.repeat_interleave(children, dim=1), found.scores.flatten(1))
        laws.append(found.laws)
        if level + 1 < deepest:
            front = _next_front(front, found, start, step, level + 1, ending, top_k)
    grown, places = best_nodes(pool, total)
    drawn = [[(node, slots[at]) for node, at in enumerate(row) if slots[at] >= 0] for row in places]
    return grown, DrawnNodes([[node for node, _ in row] for row in drawn], _laws_of(laws, drawn))


def _children(
    scores: torch.Tensor,
    guessed: tuple[torch.Tensor, torch.Tensor],
    ids: torch.Tensor,
    left: torch.Tensor,
    levels: list[int],
    draw: Draw,
    top_k: int,
) -> _Level:
    """Decides which children the nodes of a front get, then draws those that are to be drawn.

    Args:
        scores: `[B, w]`, of the front; guessed: likelihoods and laws `[B, w, N]`; ids: `[N]`.
        left: `[B, 1]`, nodes still to be had; levels: per row, how many levels are to come.
        draw, top_k: as for `grow_drawn`.
    """
    likely, law = guessed
    chances, columns = likely.topk(min(top_k, likely.shape[-1]), dim=-1)  # [B, w, K]
    kept = _worth_having(scores[:, :, None] + _gains(chances).log(), left, levels)  # [B, w, K + 1]
    chosen, drawing = kept[..., :-1], kept[..., -1:]
    rest = law.scatter(-1, columns, torch.where(chosen, 0.0, law.gather(-1, columns)))
    mass = rest.sum(-1, keepdim=True)
    drawing = drawing & (mass > _NOTHING)
    certain = torch.zeros_like(rest)
    certain[..., 0] = 1  # where nothing is drawn: a law that costs no chance
    rest = torch.where(drawing, rest / mass, certain)
    drawn = draw(rest.flatten(0, 1), ids).view(*columns.shape[:2], 1)
    beside = (1 - (chances * chosen).sum(-1, keepdim=True)).clamp(min=0)
    logs = scores[:, :, None] + torch.cat([chances, _drawn_chance(beside)], dim=-1).log()
    logs = logs.masked_fill(~torch.cat([chosen, drawing], dim=-1), float("-inf"))
    return _Level(torch.cat([ids[columns], drawn], dim=-1), logs, rest)


def _drawn_chance(mass: torch.Tensor) -> torch.Tensor:
    """Chance that a drawn child is followed, by the weight of what it is drawn from in the head's law.

    Measured with the head that is shipped: 0.49 where nothing was chosen, a third where six tenths of the weight are
    left, a quarter where four tenths are.
    """
    return mass * (0.1 + 0.39 * mass)


def _gains(chances: torch.Tensor) -> torch.Tensor:
    """How much likelier the children of a node hold the next token with each more, `[B, w, K + 1]`; the drawn one last.

    The drawn one has its turn when it is worth more than the next chosen one; those after it take from what it is
    drawn from.

    Args:
        chances: `[B, w, K]`, of the likeliest ids.
    """
    taken = torch.cat([torch.zeros_like(chances[..., :1]), chances.cumsum(-1)], dim=-1)
    drawing = _drawn_chance((1 - taken).clamp(min=0))  # [B, w, K + 1], after so many chosen ones
    after = (chances < drawing[..., :-1]).cumsum(-1) > 0  # [B, w, K], whether the drawn one has had its turn
    turn = (~after).sum(-1, keepdim=True)
    late = (chances + drawing[..., 1:] - drawing[..., :-1]).clamp(min=0)
    return torch.cat([torch.where(after, late, chances), drawing.gather(-1, turn)], dim=-1)


def _worth_having(gains: torch.Tensor, left: torch.Tensor, levels: list[int]) -> torch.Tensor:
    """Which children to have now, so that what is left suffices for as good ones on the levels to come.

    The levels to come are taken to be what they are on average: every node of this one brings `_descendants`.

    Args:
        gains: `[B, w, K + 1]`, logs; left: `[B, 1]`; levels: per row, how many are to come.
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


def _laws_of(laws: list[torch.Tensor], drawn: list[list[tuple[int, int]]]) -> torch.Tensor:
    """`[B, D, N]`: per row the laws of its drawn nodes, found by their slots; shorter rows are filled with zeros."""
    every = torch.cat(laws, dim=1)
    found = every.new_zeros(len(drawn), max(len(row) for row in drawn), every.shape[2])
    for b, row in enumerate(drawn):
        found[b, : len(row)] = every[b, [slot for _, slot in row]]
    return found
