# SPDX-License-Identifier: Apache-2.0
"""The setups of a chain from the whole of it down, and what its last level is like."""

from __future__ import annotations

from collections.abc import Sequence

from ..host.release import input_device
from ..levels.base import Drafter
from ..levels.joined import JoinedDrafter
from .setups import Chain


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
