# SPDX-License-Identifier: Apache-2.0
"""Trees grown level by level on the host are those of `grow`, with fewer nodes run through the head."""

from __future__ import annotations

import random

import pytest
import torch

from hf_polyspec.levels.eagle_tree import Grown, grow
from hf_polyspec.levels.host_tree import grow_on_host

IDS, WIDTH = 11, 6


class Guessing:
    """A head whose law after a path follows from all of its tokens; counts the nodes that it is run on."""

    def __init__(self, seed: int, sharp: float) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.embedding = torch.randn(IDS, WIDTH, generator=generator)
        self.scores = torch.randn(WIDTH, IDS, generator=generator) * sharp
        self.run = 0

    def best(self, states: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        found = (states @ self.scores).log_softmax(-1).topk(min(count, IDS), dim=-1)
        return found.values, found.indices

    def after(self, tokens: torch.Tensor, features: torch.Tensor, sees: torch.Tensor) -> torch.Tensor:
        self.run += tokens.shape[1]
        depth = sees.sum(-1, keepdim=True)  # of nodes: what a node sees is its path
        return torch.tanh(features * 0.7 + self.embedding[tokens] + 0.1 * depth)

    def step(self, tokens: torch.Tensor, features: torch.Tensor, level: int, sees: torch.Tensor) -> torch.Tensor:
        return self.after(tokens, features, sees)

    def step_nodes(
        self, tokens: list[list[int]], above: list[list[int]], features: torch.Tensor, level: int, sees: torch.Tensor
    ) -> torch.Tensor:
        width = len(tokens[0])
        for row, parents in zip(sees, above, strict=True):
            before = row[:, : row.shape[1] - width]
            nearest = [int(places.nonzero()[-1]) if places.any() else -1 for places in before]
            assert nearest == parents
        return self.after(torch.tensor(tokens), features, sees)


def both(seed: int) -> tuple[Grown, Grown, Guessing, Guessing]:
    dice = random.Random(seed)
    batch = dice.choice([1, 1, 3])
    room, total = [dice.randint(0, 6) for _ in range(batch)], [dice.randint(1, 24) for _ in range(batch)]
    room[0] = max(room[0], 1)
    sharp, top_k = dice.choice([0.3, 1.0, 3.0]), dice.randint(1, 8)
    threshold, ends = dice.choice([0.0, 0.0, 0.2]), frozenset(dice.sample(range(IDS), dice.choice([0, 2])))
    hidden = torch.randn(batch, 1, WIDTH, generator=torch.Generator().manual_seed(seed))
    slow, quick = Guessing(seed, sharp), Guessing(seed, sharp)
    settings = {"top_k": top_k, "threshold": threshold, "ends": ends}
    wanted = grow(hidden, room, total, slow.best, slow.step, **settings)
    return wanted, grow_on_host(hidden, room, total, quick.best, quick.step_nodes, **settings), slow, quick


@pytest.mark.parametrize("seed", range(60))
def test_trees_are_the_same(seed: int) -> None:
    wanted, found, slow, quick = both(seed)
    assert found == wanted
    assert quick.run <= slow.run


def test_what_cannot_be_kept_is_not_run() -> None:
    counts = [(slow.run, quick.run) for *_, slow, quick in map(both, range(60))]
    assert sum(quick for _, quick in counts) < 0.7 * sum(slow for slow, _ in counts)
