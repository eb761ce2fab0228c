# SPDX-License-Identifier: Apache-2.0
"""From seconds of passes to what is worth having: does a middle pay, and which sizes are best."""

from __future__ import annotations

from collections.abc import Sequence

from ..control.costs import BLOCKS, DRAFTS, SURE, Costs

PACKED_GAIN = 0.97
"""Packing is used where it takes at most this share of the time."""
MIDDLE_GAIN = 1.1
"""A middle must promise this many times the speed of the model alone, where nothing else drafts."""
DRAFTER_GAIN = 1.15
"""A head, or layers of the model's own, must promise this many times the speed of the model alone."""
ASSUMED = 0.9
"""Agreement of a quantised copy where the prompt was too short to tell."""

Points = Sequence[Sequence[float]]


def worth(target: Points, middle: Points, agreed: float | None) -> float:
    """How much a middle promises, above 1 if it is enough to have it."""
    costs = Costs([target, middle], ASSUMED if agreed is None else agreed)
    return max(costs.speed_of_block(block) for block in BLOCKS) / MIDDLE_GAIN


def sizes_of(target: Points, middle: Points | None, agreed: float | None) -> dict[str, int]:
    """Draft length and block size that promise most, as options of `generate()`."""
    costs = Costs([target, middle or target], ASSUMED if agreed is None else agreed)
    found = {"num_assistant_tokens": max(DRAFTS, key=lambda size: costs.speed_of_draft(size, SURE))}
    if middle:
        found["polyspec_block_size"] = max(BLOCKS, key=costs.speed_of_block)
    return found


def milliseconds(seconds: float) -> str:
    """As it is shown."""
    return f"{1000 * seconds:.1f} ms"
