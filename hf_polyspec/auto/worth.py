# SPDX-License-Identifier: Apache-2.0
"""From seconds of passes to what is worth having: does a middle pay, and which sizes are best."""

from __future__ import annotations

from collections.abc import Sequence

from ..control.costs import BLOCKS, DRAFTS, SURE, Costs, Head

PACKED_GAIN = 0.97
"""Packing is used where it takes at most this share of the time."""
MIDDLE_GAIN = 1.1
"""A middle must promise this many times the speed of the model alone, where nothing else drafts."""
DRAFTER_GAIN = 1.15
"""A head, or layers of the model's own, must promise this many times the speed of the model alone."""
ALONE_GAIN = 1.1
"""A head without the copy must promise this many times the speed of both: how often it is right depends on the text."""
JOINT_GAIN = 1.1
"""A head below a copy must promise this many times the speed of the copy alone, whose passes then have to show it their
hidden states."""
ASSUMED = 0.9
"""Agreement of a quantised copy where the prompt was too short to tell."""

LONGEST_FIXED = 12
"""Tokens of a draft at most where nobody follows how drafts fare."""

Points = Sequence[Sequence[float]]


def worth(target: Points, middle: Points, agreed: float | None) -> float:
    """How much a middle promises, above 1 if it is enough to have it."""
    return speed_over(target, middle, agreed) / MIDDLE_GAIN


def speed_over(target: Points, middle: Points, agreed: float | None, head: Head | None = None) -> float:
    """Speed of a model over a middle, with a head below that or without, in that of the model alone."""
    costs = Costs([target, middle], ASSUMED if agreed is None else agreed, head)
    return max(costs.speed_of_block(block) for block in BLOCKS)


def sizes_of(target: Points, middle: Points | None, agreed: float | None, head: Head | None = None) -> dict[str, int]:
    """Draft length and block size that promise most, as options of `generate()`."""
    costs = Costs([target, middle or target], ASSUMED if agreed is None else agreed, head)
    drafts = costs.steps(1 if middle else 0, 1) if head else 0
    sizes = [size for size in DRAFTS if size <= LONGEST_FIXED]
    found = {"num_assistant_tokens": drafts or max(sizes, key=lambda size: costs.speed_of_draft(size, SURE))}
    if middle:
        found["polyspec_block_size"] = max(BLOCKS, key=costs.speed_of_block)
    return found


def milliseconds(seconds: float) -> str:
    """As it is shown."""
    return f"{1000 * seconds:.1f} ms"


def why_nobody(names: Sequence[str], left: Sequence[str]) -> str:
    """What speaks against the first of these that was left out, for the end of a line.

    Args:
        names: of copies, and of packing; left: sentences on what was left out, which begin with its name.
    """
    found = (sentence for name in names for sentence in left if sentence.startswith(f"{name}: "))
    return "".join(f"; no {sentence}" for sentence in list(found)[:1])
