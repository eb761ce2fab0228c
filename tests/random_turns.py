# SPDX-License-Identifier: Apache-2.0
"""Turns of drafts, acceptances and rollbacks at random, through a runner."""

from __future__ import annotations

import random

import torch

from hf_polyspec.exactness.context import Context, Prompt
from hf_polyspec.host.recurrent import RecurrentRunner
from hf_polyspec.telemetry.counters import LevelStats

PROMPT = 4


def _fresh(model: torch.nn.Module, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]


@torch.no_grad()
def walk(model: torch.nn.Module, runner: RecurrentRunner, steps: int, rows: int = 3) -> float:
    """Largest difference of a logit from a fresh pass, over random turns of uneven rows."""
    chance = random.Random(7)
    stats = LevelStats("walk", 0)
    texts = [[chance.randrange(3, 48) for _ in range(PROMPT)] for _ in range(rows)]
    prompt = Prompt(PROMPT, None, torch.arange(PROMPT).expand(rows, -1))
    worst = 0.0
    for _ in range(steps):
        drafts = [[chance.randrange(3, 48) for _ in range(chance.randrange(5))] for _ in texts]
        logits = runner.run(Context([list(ids) for ids in texts], prompt), drafts, stats).logits
        for row, (ids, draft) in enumerate(zip(texts, drafts, strict=True)):
            wanted = _fresh(model, ids + draft)[len(ids) - 1 :]
            worst = max(worst, float((logits[row, : len(draft) + 1] - wanted).abs().max()))
        for ids, draft in zip(texts, drafts, strict=True):
            ids += draft[: chance.randrange(len(draft) + 1)]
            if chance.random() < 0.2:  # a level above took some of it back
                del ids[max(PROMPT, len(ids) - chance.randrange(1, 9)) :]
            ids.append(chance.randrange(3, 48))
    return worst
