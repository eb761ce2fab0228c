# SPDX-License-Identifier: Apache-2.0
"""One call of generate() in several processes: what they must agree on, and which levels run where."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from types import TracebackType
from typing import Any

import torch
from torch import nn

from ..eagle.features import lend_parts
from ..eagle.modeling import EagleHead
from ..errors import LevelError
from ..exactness.callers_generator import read_state, write_state
from ..host.ranks import Ranks, is_split, ranks_of
from ..host.release import inner_model
from ..host.trees import hindrance
from ..levels.base import Drafter
from ..levels.elsewhere import Elsewhere, Relay
from ..levels.names import name_of
from ..levels.verifier import Verifier
from .options import PolySpecOptions

ONLINE = (
    'polyspec_control="online" and assistant_models[{place}] ({name}), whose passes several processes share, do not go '
    'together: the control runs in one process; leave it at "fixed", or pass a model that is not sharded.'
)
DRAWS = (
    "polyspec_verification={rule!r} has every level draw by itself, and the target's passes are shared by processes, "
    'which sample alike by shared noise only; leave it at "auto".'
)


SYNCED_GPUS = (
    "synced_gpus (DeepSpeed ZeRO-3, FSDP) needs all processes to run the same number of forward passes, "
    "which a chain cannot promise; gather the weights or use plain generation."
)


class Meeting:
    """The processes that share a target, at the beginning of a call: a refusal in one of them is one in all.

    Args:
        model: the target; synced_gpus: as the caller said it.

    Raises:
        ValueError: the target's weights are spread in a way that a chain cannot follow.
    """

    def __init__(self, model: Any, synced_gpus: bool = False) -> None:
        if synced_gpus:
            raise ValueError(SYNCED_GPUS)
        self.ranks: Ranks = ranks_of(model)
        self._begun = False

    def __enter__(self) -> Meeting:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._begun or not isinstance(error, Exception):
            return
        try:
            self.ranks.gathered((" ".join(str(error).split()), None))
        except LevelError:
            return  # nobody is left to be told

    def begin(self, facts: dict[str, Any]) -> None:
        """Everything has been checked here; go on when it has everywhere.

        Args:
            facts: what has to be the same in all processes that run this generation in step.

        Raises:
            ValueError: another process refused, or was called with something else.
        """
        said = self.ranks.gathered((None, facts))
        self._begun = True
        for rank, (refusal, _) in enumerate(said):
            if refusal is not None:
                raise ValueError(f"process {rank} of {self.ranks.size} refused this call: {refusal}")
        names = {name for _, facts in said for name in facts}
        for name in sorted(names):
            value = said[0][1].get(name)
            others = [str(rank) for rank, (_, theirs) in enumerate(said) if theirs.get(name) != value]
            if others:
                raise ValueError(
                    f"the target's passes are shared by {self.ranks.size} processes, which must all be called alike: "
                    f"{name} of process {', '.join(others)} differs from that of process 0."
                )

    def take_generator(self, device: torch.device) -> None:
        """Torch's default generator of every process stands where rank 0's does."""
        if self.ranks.in_step:
            state = read_state(device)
            write_state(device, torch.tensor(self.ranks.first(state.tolist()), dtype=state.dtype))


def facts_of(
    ids: torch.Tensor, mask: torch.Tensor | None, config: Any, options: PolySpecOptions, assistants: Sequence[Any]
) -> dict[str, Any]:
    """What processes that run one generation in step have to agree on, small enough to be sent."""
    said = {name: value for name, value in config.to_dict().items() if isinstance(value, (int, float, str))}
    said.pop("max_time", None)  # what is left of it differs, and process 0's clock counts
    return {
        **said,
        "input_ids": (tuple(ids.shape), _hash(ids)),
        "attention_mask": None if mask is None else (tuple(mask.shape), _hash(mask.long())),
        "the polyspec options": repr(options),
        "the sharded assistant_models": [type(inner_model(assistants[i])).__name__ for i in shared_places(assistants)],
    }


def _hash(tensor: torch.Tensor) -> int:
    return zlib.crc32(repr(tensor.tolist()).encode())


def shared_places(assistants: Sequence[Any]) -> list[int]:
    """Which members' passes need other processes."""
    return [i for i, one in enumerate(assistants) if isinstance(one, nn.Module) and is_split(one)]


def here(target: Any, assistants: Any, ranks: Ranks) -> Any:
    """The members of a chain that run in this process.

    Where processes run one generation in step, levels that are not shared run in process 0, and `Elsewhere` stands for
    them in the others. Collective: what heads borrow of a shared model is put together, and it is tried on trees.

    Raises:
        ValueError: a member is shared by processes and cannot be where it is.
    """
    if not isinstance(assistants, (list, tuple)):
        return assistants
    shared = shared_places(assistants)
    for i in shared:
        if not ranks.in_step:
            raise ValueError(
                f"assistant_models[{i}] ({_name(assistants[i])}) is sharded over processes, and the target is not; "
                "load it whole in every process."
            )
    for above, one in zip([target, *assistants], assistants, strict=False):
        if isinstance(one, EagleHead) and isinstance(above, nn.Module) and is_split(above):
            lend_parts(inner_model(above), keeps=ranks.leads)
            hindrance(inner_model(above))  # found out by passes, once a model, which all have to take part in
    if ranks.leads:
        return list(assistants)
    last = max(shared, default=-1)
    kept = list(assistants[: last + 1])
    for i, one in enumerate(kept):
        if isinstance(one, Elsewhere):
            raise ValueError(
                f"assistant_models[{i}] is made of the target in process 0 only, and assistant_models[{last}] below it "
                "is sharded over processes; put the sharded one above it."
            )
    return kept if len(kept) == len(assistants) else [*kept, Elsewhere()]


def check_shared(options: PolySpecOptions, do_sample: bool, assistants: Sequence[Any], ranks: Ranks) -> None:
    """Refuse what processes cannot do in step.

    Raises:
        ValueError: in one sentence.
    """
    if not ranks.in_step:
        return
    if do_sample and not options.couples:
        raise ValueError(DRAWS.format(rule=options.polyspec_verification))
    for place in shared_places(assistants):
        if options.polyspec_control == "online":
            raise ValueError(ONLINE.format(place=place, name=_name(assistants[place])))


def share(chain: Verifier, assistants: Sequence[Any], ranks: Ranks) -> None:
    """Have the levels that run in all processes ask the others as `Relay` does."""
    if not ranks.in_step:
        return
    last, levels = max(shared_places(assistants), default=-1) + 1, list[Drafter]([chain])
    while isinstance(levels[-1], Verifier) and len(levels) <= last:
        levels.append(levels[-1].below)
    asking = Relay(ranks, levels)
    for level in levels:
        if isinstance(level, Verifier):
            level.ask, level.ask_for_tree = asking.ask, asking.ask_for_tree
            level.trees = level.trees or not ranks.leads  # which the levels in process 0 know


def _name(model: Any) -> str:
    return name_of(model) or type(inner_model(model)).__name__
