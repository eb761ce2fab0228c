# SPDX-License-Identifier: Apache-2.0
"""Growing a tree with an EAGLE head (EAGLE-2, arXiv 2406.16858): follow the likeliest, then keep the likeliest."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from ..trees import ROOT

Step = Callable[[torch.Tensor, torch.Tensor, int, torch.Tensor], torch.Tensor]
"""(tokens `[B, k]`, features `[B, k, H]`, depth, who sees which node fed so far `[B, k, N]`) -> `[B, k, H]`."""


@dataclass(frozen=True)
class Grown:
    """Nodes per row in level order, with their parents."""

    tokens: list[list[int]]
    parents: list[list[int]]


@dataclass
class _Pool:
    """All candidates so far, level after level: `[B, N]` each."""

    tokens: torch.Tensor
    parents: torch.Tensor
    scores: torch.Tensor

    def add(self, tokens: torch.Tensor, parents: torch.Tensor, scores: torch.Tensor) -> None:
        self.tokens = torch.cat([self.tokens, tokens], dim=1)
        self.parents = torch.cat([self.parents, parents], dim=1)
        self.scores = torch.cat([self.scores, scores], dim=1)


def grow(
    hidden: torch.Tensor,
    room: list[int],
    score: Callable[[torch.Tensor], torch.Tensor],
    step: Step,
    *,
    total: int,
    depth: int,
    top_k: int,
) -> Grown:
    """A tree per row; one host synchronisation.

    Args:
        hidden: `[B, 1, H]`, the head's output after the context.
        room: longest path per row, 0 for rows that need nothing.
        score: `[B, n, H]` -> log-probabilities `[B, n, V]`, float32, -inf for ids the head does not know.
        step: runs the head on one level.
        total, depth, top_k: nodes kept, levels grown, nodes expanded a level.
    """
    log_p = score(hidden)[:, 0]  # [B, V]
    width = min(top_k, log_p.shape[-1])
    scores, tokens = log_p.topk(width, dim=-1)  # [B, k]
    limits = torch.tensor(room, device=scores.device)[:, None]
    pool = _Pool(tokens, torch.full_like(tokens, ROOT), scores.masked_fill(limits < 1, float("-inf")))
    front = torch.arange(width, device=tokens.device).expand_as(tokens)  # places in the pool
    features = hidden.expand(-1, width, -1)
    sees = torch.eye(width, dtype=torch.bool, device=tokens.device).expand(len(room), -1, -1)
    for level in range(1, min(depth, max(room))):
        out = step(tokens, features, level, sees)  # [B, k, H]
        more, candidates = score(out).topk(width, dim=-1)  # [B, k, k]
        summed = (pool.scores.gather(1, front)[:, :, None] + more).flatten(1)  # [B, k * k]
        summed = summed.masked_fill(limits < level + 1, float("-inf"))
        start = pool.tokens.shape[1]
        parents = front[:, :, None].expand(-1, -1, width).flatten(1)
        pool.add(candidates.flatten(1), parents, summed)
        chosen = summed.topk(width, dim=-1).indices  # [B, k] places among the candidates
        front = start + chosen
        tokens = candidates.flatten(1).gather(1, chosen)
        of_parent = chosen // width  # [B, k] place of the parent among the level just run
        features = out.gather(1, of_parent[:, :, None].expand(-1, -1, out.shape[2]))
        inherited = sees.gather(1, of_parent[:, :, None].expand(-1, -1, sees.shape[2]))
        own = torch.eye(width, dtype=torch.bool, device=tokens.device).expand(len(room), -1, -1)
        sees = torch.cat([inherited, own], dim=2)
    return _best(pool, total)


def _best(pool: _Pool, total: int) -> Grown:
    """The likeliest nodes of each row, in level order.

    The pool is in level order and a child is never likelier than its parent, so a stable sort takes parents first:
    what is kept is closed under ancestors, ties included.
    """
    order = pool.scores.sort(dim=1, descending=True, stable=True).indices[:, :total]
    places = order.sort(dim=1).values  # [B, N]
    usable = torch.isfinite(pool.scores.gather(1, places))
    packed = torch.stack([places, pool.tokens.gather(1, places), pool.parents.gather(1, places), usable.long()])
    tokens: list[list[int]] = []
    parents: list[list[int]] = []
    for at, ids, above, possible in zip(*packed.tolist(), strict=True):
        kept = [i for i, alive in enumerate(possible) if alive]
        number = {ROOT: ROOT} | {at[i]: new for new, i in enumerate(kept)}
        tokens.append([ids[i] for i in kept])
        parents.append([number[above[i]] for i in kept])
    return Grown(tokens, parents)
