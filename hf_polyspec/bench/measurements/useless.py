# SPDX-License-Identifier: Apache-2.0
"""Chains that bring nothing, and the ways of generating that are compared on them: with and without their control."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from ...auto.choosing import SUFFIX, assume
from ...auto.measuring import SIZES, Progress, agreement, own_text, time_passes
from ...auto.worth import ASSUMED, milliseconds
from ...control import forget
from ...exactness.context import Context
from ...exactness.distributions import LawMaker
from ...exactness.proposal import Proposal
from ...levels.base import Drafter
from ...models.assistants import AUTO, quantized_copy
from ...quantization import pack
from ...quantization.modules import sharing_copy

KINDS = ("drafter", "middle", "both", "model")
CONTROLS = (AUTO, "online", "fixed")
PLAIN, ALONE, CONTROLLED = "plain generate()", "the target alone", "controlled"
MIDDLE, DRAFTER = "int8", "random ids"


class WrongDrafter(Drafter):
    """Proposes random ids as fast as it can: the cheapest useless drafter.

    Args:
        rows: number of ids to choose from.
    """

    name = DRAFTER
    asks_nobody = True  # what "auto" takes runs no code of a caller's, for which the model would be looked over

    def __init__(self, rows: int) -> None:
        super().__init__()
        self.rows = rows
        self._dice = random.Random(0)

    def propose(self, context: Context, limits: list[int], law: LawMaker) -> Proposal:
        tokens = [[self._dice.randrange(self.rows) for _ in range(min(5, limit))] for limit in limits]
        return Proposal(tokens, None, [[self.index] * len(row) for row in tokens])


@dataclass(frozen=True)
class Case:
    """A target with a chain that never helps.

    Attributes:
        target: as it runs in all of the ways; kind: of the chain, one of `KINDS`; control: one of `CONTROLS`.
        ways: arguments of `generate()` by name of the way; all but `CONTROLLED` are what it is compared with.
        forget: drops what the control has learnt; about: what it believes of the chain beforehand.
    """

    target: Any
    kind: str
    control: str
    ways: Mapping[str, dict[str, Any]]
    forget: Callable[[], None] = field(default=forget)
    about: str = ""


def rows_of(target: Any) -> int:
    """Ids of its vocabulary."""
    return int(target.config.get_text_config(decoder=True).vocab_size)


def scrambled(target: Any) -> Any:
    """A copy of a model with random weights of the same spread."""
    found = copy.deepcopy(target)
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        for parameter in found.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, float(parameter.std()))
    return found


def useless(target: Any, kind: str) -> list[Any]:
    """Assistants that never help: a drafter of random ids, a random middle as large as the target, or both.

    "model" is the random model as the drafter itself.
    """
    if kind == "drafter":
        return [WrongDrafter(rows_of(target))]
    middle = scrambled(target)
    return [middle, WrongDrafter(rows_of(target))] if kind == "both" else [middle]


def case_of(target: Any, kind: str, control: str) -> Case:
    """The ways that are compared on a useless chain.

    Args:
        target: the model, not packed; it stays as it is. kind: one of `KINDS`; control: one of `CONTROLS`.

    Raises:
        ValueError: "auto" has no such chain.
    """
    if control == AUTO:
        return _assumed(target, kind)
    steered = {"assistant_models": useless(target, kind), "polyspec_control": control}
    return Case(target, kind, control, {PLAIN: {}, CONTROLLED: steered})


def _assumed(target: Any, kind: str) -> Case:
    """The same for the control of "auto", which believes what it would of the target's real int8 copy.

    A middle as large as the target would never be asked, so this one is an int8 copy of the random model: its passes
    take the time of the real copy's. The target is packed, as "auto" packs it where that pays.
    """
    if kind not in KINDS[:3]:
        raise ValueError(f'"auto" never takes a whole model as its drafter; its chains are {", ".join(KINDS[:3])}.')
    packed = pack(sharing_copy(target))
    progress = Progress("", told=True)
    passes = time_passes({"target": packed}, {"target": SIZES}, progress)
    about = f"a pass of the target takes {milliseconds(passes['target'][0][1])}"
    levels: dict[str, Any] = {}
    agreed: dict[str, float] = {}
    scales: dict[str, float] = {}
    if kind != "drafter":
        alike = agreement(pack(quantized_copy(target, 8)), packed, own_text(packed, []))
        agreed[MIDDLE] = ASSUMED if alike is None else alike.share
        if alike is not None and alike.scale is not None:
            scales[MIDDLE] = alike.scale
        levels[MIDDLE] = pack(quantized_copy(scrambled(target), 8))
        passes |= time_passes({MIDDLE: levels[MIDDLE]}, {MIDDLE: SIZES[:4]}, progress)
        about += f", of the middle {milliseconds(passes[MIDDLE][0][1])}; it is expected to be right in "
        about += f"{agreed[MIDDLE]:.0%}"
    # A suffix drafter finds nothing in random words: the middle is left to itself.
    levels |= {SUFFIX: None} if kind == "middle" else {DRAFTER: WrongDrafter(rows_of(target))}

    def anew() -> None:
        assume(packed, levels, passes, agreed, scales)

    anew()
    ways: dict[str, dict[str, Any]] = {
        PLAIN: {},
        ALONE: {"assistant_models": []},
        CONTROLLED: {"assistant_models": AUTO},
    }
    return Case(packed, kind, AUTO, ways, anew, about)
