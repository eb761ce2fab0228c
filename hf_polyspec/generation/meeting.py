# SPDX-License-Identifier: Apache-2.0
"""One call of generate() in several processes: what they must agree on, and which levels run where."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from contextlib import suppress
from types import TracebackType
from typing import Any

import torch
from torch import nn

from ..eagle.features import lend_parts
from ..eagle.modeling import EagleHead
from ..errors import LevelError
from ..exactness.callers_generator import read_state, write_state
from ..exactness.randomness import Deciding, decided_here
from ..host.encoded import is_encoder_decoder
from ..host.forwarding import Extras
from ..host.ranks import Ranks, Spread, check_gathered, is_split, ranks_of
from ..host.release import inner_model
from ..host.trees import hindrance
from ..host.turns import Turns
from ..levels.base import Drafter
from ..levels.elsewhere import Elsewhere, Relay, Relayed
from ..levels.mtp import MtpDrafter
from ..levels.names import name_of
from ..levels.shown import ShownDrafter
from ..levels.verifier import Verifier
from ..models.companions import is_companion
from .options import PolySpecOptions

SYNCED_GPUS = (
    "synced_gpus is for processes that must run the same number of forward passes (DeepSpeed ZeRO-3, FSDP1), which a "
    "chain promises for a target under FSDP2 only, by itself; leave it out, gather the weights, or generate without "
    "assistant_models."
)
PARTS = (
    "the target ({kind}) reads more than ids, by parts that not all processes would run at once, and its weights are "
    "spread over them (FSDP2); gather them, or leave assistant_models out."
)
ALL_SPREAD = (
    "{role} cannot be used while processes hold the target's weights in parts (FSDP2), where {reason}; put a "
    'model that each process holds whole there, "int8" or a drafter without a model.'
)


class Meeting:
    """The processes that share a target, at the beginning of a call: a refusal in one of them is one in all.

    Args:
        model: the target; synced_gpus: as the caller said it.

    Raises:
        ValueError: the target's weights are spread in a way that a chain cannot follow.
    """

    def __init__(self, model: Any, synced_gpus: bool = False) -> None:
        self.ranks: Ranks = ranks_of(model)
        if synced_gpus and not isinstance(self.ranks, Spread):
            raise ValueError(SYNCED_GPUS)
        self.turns = Turns(model, self.ranks)
        if isinstance(self.ranks, Spread):
            self.ranks.put_together = self.turns.put_together
        self._begun = False
        self._apart = False

    def __enter__(self) -> Meeting:
        self.turns.open()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.turns.taken:
            self._leave(error)
            return
        if self._begun or self._apart or not isinstance(error, Exception):
            return
        try:
            self.ranks.gathered((" ".join(str(error).split()), None))
        except LevelError:
            return  # nobody is left to be told

    def begin(self, facts: Callable[[], dict[str, Any]]) -> None:
        """Everything has been checked here; go on when it has everywhere.

        Args:
            facts: tells what has to be the same in all processes that run this generation in step; asked where there
                are several.

        Raises:
            ValueError: another process refused, or was called with something else.
        """
        if self.turns.taken:
            self.turns.begin()
        else:
            self.agree(facts)
        self._begun = True

    def _leave(self, error: BaseException | None) -> None:
        """Processes that generate each by itself wait for the last; what becomes of it then is its own affair."""
        with suppress(LevelError):
            if error is None:
                self.turns.end()
            elif self._begun:
                self.turns.fail()
            else:
                self.turns.refuse(" ".join(str(error).split()))

    def agree(self, facts: Callable[[], dict[str, Any]]) -> None:
        """The same, for what comes before that and takes all processes."""
        if self.ranks.size == 1:
            return
        said = self.ranks.gathered((None, facts()))
        self._apart = True  # everybody knows of what is raised here
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
        self._apart = False

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


def here(target: Any, assistants: Any, ranks: Ranks, everywhere: bool = False) -> Any:
    """The members of a chain that run in this process.

    Where processes run one generation in step, levels that are not shared run in process 0, and `Elsewhere` stands for
    them in the others. Collective: what heads borrow of a shared model is put together, and it is tried on trees.

    Args:
        target: the model; assistants: the members; ranks: the processes that hold the target.
        everywhere: whether levels that are not shared run in every process instead.

    Raises:
        ValueError: a member is shared by processes and cannot be where it is, or partitioned by DeepSpeed ZeRO-3.
    """
    if not isinstance(assistants, (list, tuple)):
        return assistants
    for i, one in enumerate(assistants):
        if isinstance(one, nn.Module):
            check_gathered(one, f"assistant_models[{i}]")
    shared = shared_places(assistants)
    if isinstance(ranks, Spread):
        _check_below(assistants, shared)
        if assistants and isinstance(assistants[0], EagleHead):
            ranks.put_together()
        return list(assistants)
    for i in shared:
        if not ranks.in_step:
            raise ValueError(
                f"assistant_models[{i}] ({_name(assistants[i])}) is sharded over processes, and the target is not; "
                "load it whole in every process."
            )
    for above, one in zip([target, *assistants], assistants, strict=False):
        reads = isinstance(one, (EagleHead, MtpDrafter)) or (isinstance(one, Elsewhere) and one.reads_states)
        if (reads or is_companion(one)) and isinstance(above, nn.Module) and is_split(above):
            lend_parts(inner_model(above), keeps=ranks.leads, everywhere=everywhere)
            if isinstance(one, MtpDrafter):
                one.layers.take_whole_parts(keeps=ranks.leads)
            hindrance(inner_model(above))  # found out by passes, once a model, which all have to take part in
    if ranks.leads or everywhere:
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


def check_spread(model: Any, extras: Extras, ranks: Ranks) -> None:
    """Refuse what only some processes would run, where all have to.

    Args:
        model: the target; extras: what it is given besides a prompt; ranks: the processes that hold its weights.

    Raises:
        ValueError: in one sentence.
    """
    if isinstance(ranks, Spread) and (is_encoder_decoder(model) or extras.marks_prompt):
        raise ValueError(PARTS.format(kind=type(model).__name__))


def _check_below(assistants: Sequence[Any], shared: Sequence[int]) -> None:
    """Refuse levels that need more of a target under FSDP2 than its passes.

    Raises:
        ValueError: in one sentence.
    """
    for i, one in enumerate(assistants):
        reason = "it would need passes of its own that all processes take part in" if i in shared else None
        if i == 0 and isinstance(one, ShownDrafter):
            reason = "it computes with the target's own embedding and lm_head"
        if reason is not None:
            raise ValueError(ALL_SPREAD.format(role=f"assistant_models[{i}] ({_name(one)})", reason=reason))


def share(chain: Verifier, assistants: Sequence[Any], ranks: Ranks, everywhere: bool = False) -> Deciding:
    """Have the levels that run in all processes ask the others as `Relayed` does; `everywhere`: see `here`.

    Returns:
        Who takes the decisions that levels draw for.
    """
    if not ranks.in_step:
        return decided_here
    levels = shared_levels(chain, assistants)
    relay = Relay(ranks, levels, everywhere, chain.stats.notes)
    for level in levels:
        if isinstance(level, Verifier):
            asking = Relayed(relay)
            level.ask, level.ask_for_tree = asking.ask, asking.ask_for_tree
            level.direct_tokens = 0  # how sure a draft is, is not told: a block would close in one process only
            level.trees = level.trees or not (ranks.leads or everywhere)  # which the levels in process 0 know
    return relay.decided


def shared_levels(chain: Verifier, assistants: Sequence[Any]) -> list[Drafter]:
    """Levels whose passes need other processes, the target first."""
    last, levels = max(shared_places(assistants), default=-1) + 1, list[Drafter]([chain])
    while isinstance(levels[-1], Verifier) and len(levels) <= last:
        levels.append(levels[-1].below)
    return levels


def _name(model: Any) -> str:
    return name_of(model) or type(inner_model(model)).__name__
