# SPDX-License-Identifier: Apache-2.0
"""Levels set up for measuring: built by the engine's own hands, and driven round by round."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..exactness.context import Context
from ..exactness.distributions import LawMaker
from ..exactness.proposal import Proposal
from ..generation.chain import build_chain
from ..generation.options import PolySpecOptions
from ..generation.setting import Setting
from ..host.manners import runner_for
from ..levels.base import Drafter
from ..levels.verifier import Verifier
from ..models.companions import with_companions


class Offer(Drafter):
    """Proposes what it was told to: the level below a verifier whose own round is to be timed.

    Attributes:
        tokens: ids proposed to every row.
    """

    name = "offer"
    shares_noise = True

    def __init__(self, tokens: Sequence[int] = ()) -> None:
        super().__init__()
        self.tokens = list(tokens)

    def propose(self, context: Context, limits: list[int], law: LawMaker) -> Proposal:
        rows = [self.tokens[:limit] for limit in limits]
        return Proposal(rows, None, [[self.index] * len(row) for row in rows])


def rig(model: Any, below: Sequence[Any], *, batch: int = 1, **options: Any) -> Verifier:
    """A model over the levels below it, begun, as `generate()` would build them, without an end of text.

    Args:
        model: the topmost model; below: the members under it, the slowest first.
        batch: rows; options: of `PolySpecOptions`.
    """
    setting = Setting(PolySpecOptions(**options), model.device, frozenset(), 0, batch)
    runner = runner_for(model, "the model", model.device, reads_embeds=True, replace_unknown_ids=True)
    return build_chain(model, with_companions(model, below), setting, runner)
