# SPDX-License-Identifier: Apache-2.0
"""Where a method's greedy text leaves plain's: the two logits, and whether they are a tie in this dtype."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

TIE_STEPS = {torch.bfloat16: 8, torch.float16: 8, torch.float32: 64}
"""How many units in the last place two logits may be apart to count as a tie: passes over one and over several tokens
add up in another order, and through tens of layers a few last bits of each product reach the logits."""


def first_difference(one: Sequence[int], other: Sequence[int]) -> int | None:
    """The first place at which two texts differ, None if they do not; where one ends counts."""
    for place, (a, b) in enumerate(zip(one, other, strict=False)):
        if a != b:
            return place
    return None if len(one) == len(other) else min(len(one), len(other))


def tie_tolerance(dtype: torch.dtype, size: float) -> float:
    """How far two logits of about `size` may be apart in a dtype and still count as a tie."""
    return TIE_STEPS.get(dtype, 8) * float(torch.finfo(dtype).eps) * max(1.0, abs(size))


@torch.no_grad()
def compare(
    model: Any,
    tokenizer: Any,
    prompt: Sequence[int],
    plain: Sequence[int],
    other: Sequence[int],
    *,
    dtype: torch.dtype | None = None,
) -> dict[str, Any] | None:
    """Where two greedy answers to one prompt part, and what the target thinks of the two choices.

    Args:
        model: the target.
        tokenizer: its own.
        prompt: ids of the prompt.
        plain: ids of plain's answer.
        other: ids of the method's.
        dtype: that both were written in, where `model` is the target in a wider one.

    Returns:
        None for equal answers; else position, both tokens and texts, both logits, their distance, the distance that
        counts as a tie, and whether this is one. Logits are None where an answer simply ended.
    """
    dtype = model.dtype if dtype is None else dtype
    place = first_difference(plain, other)
    if place is None:
        return None
    tokens = [list(ids[place : place + 1]) for ids in (plain, other)]
    found: dict[str, Any] = {
        "position": place,
        "tokens": [ids[0] if ids else None for ids in tokens],
        "texts": [str(tokenizer.decode(ids)) if ids else "" for ids in tokens],
        "logits": None,
        "gap": None,
        "tolerance": None,
        "tie": False,
        "dtype": str(dtype).removeprefix("torch."),
    }
    if all(tokens):
        ids = torch.tensor([[*prompt, *plain[:place]]], device=model.device)
        logits = model(input_ids=ids, logits_to_keep=1).logits[0, -1].float()
        pair = [float(logits[ids[0]]) for ids in tokens]
        gap, tolerance = abs(pair[0] - pair[1]), tie_tolerance(dtype, max(map(abs, pair)))
        below_best = float(logits.max()) - min(pair)
        found |= {"logits": pair, "gap": gap, "tolerance": tolerance, "tie": max(gap, below_best) <= tolerance}
    return found
