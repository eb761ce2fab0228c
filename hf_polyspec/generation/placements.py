# SPDX-License-Identifier: Apache-2.0
"""In which processes the levels of a chain can run, whose target several of them share.

A level is split as the target is ("sharded"), or whole. Levels below the last one that is split run all in process 0
("one") or all in every process by itself ("replicated"): a level that is asked in one process only has nobody below
it in the others. Whole levels above one that is split run in every process, since all have to ask that one.
"""

from __future__ import annotations

import os
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn

from ..defaults import ONE, REPLICATED, SHARDED, require_places
from ..eagle.modeling import EagleHead
from ..host.ranks import Ranks, is_split
from ..host.release import inner_model
from ..host.split_layers import can_be_parted
from ..levels.base import Drafter
from ..levels.elsewhere import Elsewhere
from ..levels.names import name_of
from ..levels.shown import ShownDrafter
from ..models.assistants import is_copy_name
from .options import PolySpecOptions

AUTO = "auto"
Arrangement = tuple[str, ...]
"""A place for each member of `assistant_models`."""


@dataclass(frozen=True)
class Placed:
    """An arrangement, and what was measured of it and of others.

    Attributes:
        places: of each member.
        seconds: by arrangement, of a draft for the target in the process where it took longest.
    """

    places: Arrangement = ()
    seconds: dict[Arrangement, float] = field(default_factory=dict)

    @property
    def everywhere(self) -> bool:
        """Whether the levels below the last that is split run in every process."""
        return self.places[-1:] == (REPLICATED,)


_known: WeakKeyDictionary[Any, dict[Hashable, Placed]] = WeakKeyDictionary()


def forget() -> None:
    """What was measured in this process; what is kept on its disk is looked up again."""
    _known.clear()


class Placing:
    """The arrangements of one call.

    Args:
        model: the target; given: `assistant_models` as the caller gave it.
        wanted: `polyspec_placement`; key: what else a measurement depends on.
        ranks: the processes that hold the target.

    Attributes:
        possible: arrangements, the one that needs least memory first; none before `find`.
        placed: the one to run, as far as it is known.
        told: the members as they were given, by name or as objects.
    """

    def __init__(self, model: Any, given: Any, wanted: Any, key: Hashable, ranks: Ranks) -> None:
        self.model, self.ranks = model, ranks
        self.told = _listed(given) if ranks.in_step else []
        self.wanted = _wanted(wanted, len(self.told)) if self.told else []
        self.key = (key, tuple(_mark(one) for one in self.told), tuple(self.wanted))
        self.possible: list[Arrangement] = []
        found = _known.get(model, {}).get(self.key) if self.told else None
        self.measured = found is not None
        self.placed = found or Placed(tuple(ONE if place == AUTO else place for place in self.wanted))

    @property
    def open(self) -> bool:
        """Whether there is something to measure."""
        return len(self.possible) > 1 and not self.measured

    def narrow(self, members: Sequence[Any], chosen: Sequence[Any]) -> None:
        """Only these of the members, which a plan has chosen, are placed."""
        kept = [i for i, one in enumerate(members) if any(one is other for other in chosen)]
        if self.told and len(kept) < len(self.told):
            self.told, self.wanted = [self.told[i] for i in kept], [self.wanted[i] for i in kept]
            self.placed, self.measured = Placed(tuple(self.placed.places[i] for i in kept)), False

    def find(self, members: Sequence[Any], options: PolySpecOptions, samples: bool) -> None:
        """See which arrangements are possible.

        Args:
            members: made of what was given; options: the call's; samples: whether its text is drawn.

        Raises:
            ValueError: none is, of those that the caller wants; the sentence names a level and what is possible.
        """
        if not self.told:
            return
        tied = _tied(options, samples)
        splits = can_be_parted(inner_model(self.model))
        pairs = zip(members, self.told, strict=True)
        kinds = [_of_copy(tied, splits) if is_copy_name(given) else _kind(one, tied) for one, given in pairs]
        self.possible = [
            arrangement
            for arrangement in _arrangements(kinds)
            if all(want in (AUTO, place) for want, place in zip(self.wanted, arrangement, strict=True))
        ]
        if not self.possible:
            raise ValueError(_refusal(members, self.wanted, kinds))
        if not self.measured:
            self.placed = Placed(self.possible[0])

    def keep(self, placed: Placed) -> None:
        """Remember what was measured, for as long as the target lives."""
        self.placed, self.measured = placed, True
        _known.setdefault(self.model, {})[self.key] = placed


def _listed(given: Any) -> list[Any]:
    if isinstance(given, (str, os.PathLike)):
        return [given]
    return list(given) if isinstance(given, (list, tuple)) else []


def _wanted(option: Any, count: int) -> list[str]:
    """What the caller wants for each member.

    Raises:
        ValueError: not as many as there are members, or no word for a place.
    """
    require_places(option)
    if isinstance(option, (list, tuple)):
        if len(option) != count:
            raise ValueError(
                f"polyspec_placement names {len(option)} placements, and assistant_models has {count} members; give "
                "one for each, or one word for all."
            )
        return list(option)
    return [str(option)] * count


def _mark(member: Any) -> Hashable:
    """Which member this is, for as long as a target lives: names, kinds and sizes, since objects come and go."""
    if isinstance(member, (str, os.PathLike)):
        return os.fspath(member)
    if isinstance(member, nn.Module):
        model = inner_model(member)
        return (type(model).__name__, name_of(member), sum(weight.numel() for weight in model.parameters()))
    return (type(member).__name__, str(getattr(member, "name", "")))


def _tied(options: PolySpecOptions, samples: bool) -> str | None:
    """Why levels that are not split have to be in process 0, whatever they are."""
    if options.polyspec_control == "online":
        return 'its sizes follow process 0\'s clock (polyspec_control="online")'
    if not options.keeps_text(samples):
        return "levels draw by themselves here (polyspec_verification, polyspec_bias_budget), with process 0's numbers"
    return None


@dataclass(frozen=True)
class _Kind:
    """What is possible for a member.

    Attributes:
        ends: where it may be with nothing split below it; above: where, with something split below it.
        why: nothing else is.
    """

    ends: Arrangement
    above: Arrangement
    why: str


def _of_copy(tied: str | None, splits: bool) -> _Kind:
    """A copy in fewer bits, which is made of the target where it is to run."""
    split = (SHARDED,) * splits
    why = tied or "the target's linear layers are not split"
    return _Kind((ONE, *split) if tied else (ONE, REPLICATED, *split), (REPLICATED, *split), why)


def _kind(member: Any, tied: str | None) -> _Kind:
    model = isinstance(member, nn.Module)
    if model and is_split(member):
        return _Kind((SHARDED,), (SHARDED,), "its weights are split")
    if isinstance(member, Elsewhere) or getattr(member, "stands_alone", False):
        return _Kind((ONE,), (), "it was made in process 0 only")
    above = (REPLICATED,) if model and not isinstance(member, EagleHead) else ()
    if tied is not None:
        return _Kind((ONE,), above, tied)
    if isinstance(member, ShownDrafter) or not (model or isinstance(member, Drafter)):
        return _Kind((ONE,), above, "it computes with what process 0 alone puts together or holds")
    if not model and not member.shares_noise:
        return _Kind((ONE,), above, "nobody says that it drafts alike in all processes (shares_noise)")
    return _Kind((ONE, REPLICATED), above, "it is not split as the target is")


def _arrangements(kinds: Sequence[_Kind]) -> list[Arrangement]:
    """All that are possible, those first in which process 0 alone holds what is whole."""
    found: list[Arrangement] = []
    for last in range(-1, len(kinds)):  # which level is the last that is split
        if last >= 0 and SHARDED not in kinds[last].ends:
            continue
        below = kinds[last + 1 :]
        tops = product(*(kind.above for kind in kinds[: max(last, 0)]))
        ends = [place for place in (ONE, REPLICATED) if all(place in kind.ends for kind in below)] if below else [""]
        for top, place in product(tops, ends):
            found.append((*top, *[SHARDED] * (last >= 0), *[place] * len(below)))
    return found


def _refusal(members: Sequence[Any], wanted: Sequence[str], kinds: Sequence[_Kind]) -> str:
    for i, (member, want, kind) in enumerate(zip(members, wanted, kinds, strict=True)):
        over_split = SHARDED in wanted[i + 1 :] or any(below.ends == (SHARDED,) for below in kinds[i + 1 :])
        places = kind.above if over_split else kind.ends
        if want != AUTO and want not in places:
            told = " or ".join(f'"{place}"' for place in places) or "nothing above what is split"
            return f'{_role(i, member)} cannot be placed "{want}": {kind.why}; possible is {told}.'
    if all(want == AUTO for want in wanted):
        i = max(i for i, kind in enumerate(kinds) if kind.ends == (SHARDED,))
        return (
            f"{_role(i, members[i])} is sharded over processes, and a level above it runs in process 0 only, where "
            "nobody asks for it in the others; put the sharded one above it."
        )
    ways = "; ".join(", ".join(way) for way in _arrangements(kinds)) or "none"
    return (
        f"assistant_models cannot be placed {list(wanted)}: what is whole below the last split level runs all in "
        f"process 0 or all in every process; possible: {ways}."
    )


def _role(place: int, member: Any) -> str:
    return (
        f"assistant_models[{place}] ({name_of(member) or getattr(member, 'name', type(inner_model(member)).__name__)})"
    )
