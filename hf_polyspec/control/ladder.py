# SPDX-License-Identifier: Apache-2.0
"""The setups of a chain from the whole of it down, and what its last level is like."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from ..host.release import input_device
from ..levels.base import Drafter
from ..levels.joined import JoinedDrafter
from .setups import Chain, Setup


def tells(leaf: Drafter | None) -> bool:
    """Whether a level, or what joins a head in it, says how likely its drafts are."""
    return leaf is not None and getattr(leaf, "branch", leaf).tells_chances


def passes_by(chain: Chain) -> int:
    """From how many tokens on what the last level finds may pass the middle above it by; 0 for never."""
    above = chain.verifiers[-1]
    if isinstance(chain.leaf, JoinedDrafter) and len(chain.verifiers) > 1:
        return chain.leaf.passes_by(input_device(above.runner.model))
    return above.direct_tokens


def ladder_of(chain: Chain) -> Sequence[tuple[int, ...]]:
    """Setups, the whole chain first, the target alone last."""
    whole = tuple(range(len(chain.levels)))
    steps = [whole]
    if len(whole) > 2 and chain.leaf is not None:
        steps.append((0, chain.last))
    return [*steps, (0,)]


def smaller(setup: Setup, blocks: Sequence[int], drafts: Sequence[int], *, leaf: bool) -> Iterator[Setup]:
    """A setup, and what is less and less of it, down to the least of these sizes.

    Args:
        setup: with a level below the target; blocks, drafts: sizes, the smallest first.
        leaf: see `Setup.at_most`.
    """
    before = None
    for block in (None, *reversed(blocks)):
        one = setup if block is None else setup.at_most(block, leaf=leaf)
        if one != before:
            before = one
            yield one
            yield from (one.drafting(size) for size in reversed(drafts) if size < one.sizes[-1])
