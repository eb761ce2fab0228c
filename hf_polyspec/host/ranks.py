# SPDX-License-Identifier: Apache-2.0
"""The processes that hold parts of one model, found from its parameters, and what they tell each other.

A model that is split for tensor parallel passes (`tp_plan="auto"`) computes every pass with all of its processes, which
must feed it the same ids: they run one generation in step. One whose weights are spread (FSDP2) computes passes over
rows of each process's own, and needs all processes to take part in as many passes (see `turns`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist

from ..errors import LevelError
from .release import inner_model
from .walking import modules_of, parameters_of_all

T = TypeVar("T")
CAPACITY = 256
"""Integers of a message that travel with the check of a round; what is longer goes after it."""
_LEAST = torch.iinfo(torch.int64).min
_GATHER = (
    "gather them for the generation and take DeepSpeed's hooks off the layers, both of which TRL's "
    "unwrap_model_for_generation does (deepspeed.zero.GatheredParameters only the first), or leave assistant_models "
    "out."
)
PARTITIONED = (
    "{role} ({kind}) has its weights partitioned by DeepSpeed ZeRO-3, of which this process holds a part only; "
    + _GATHER
)
HOOKED = (
    "{role} ({kind}) has DeepSpeed ZeRO-3's hooks on its layers, which partition gathered weights again after a pass, "
    "together with all other processes; " + _GATHER
)
FLAT = (
    "{role} ({kind}) is sharded by FSDP1, whose processes must run the same number of forward passes, which a chain "
    "cannot promise; shard it by FSDP2 (fully_shard), gather the weights (summon_full_params) and generate with the "
    "model inside, or leave assistant_models out."
)
SQUARE = (
    "{role} ({kind}) is sharded over a mesh of {dims} dimensions, and chains run on models that are sharded over one; "
    "use tensor parallelism alone, or leave assistant_models out."
)
UNEVEN = (
    "{role} ({kind}) has {heads} attention heads and {key_heads} key-value heads, which {size} processes cannot share "
    "evenly; split it over a number of processes that divides both ({numbers})."
)
PARTED = (
    "the target: the processes that share its passes have parted ways (process {ranks} holds other ids than process 0),"
    " so that nothing they compute together is worth anything; a processor, criterion or level of the caller's decided "
    "differently in each of them."
)


class Ranks:
    """One process by itself: there is nobody to tell anything."""

    in_step = False
    """Whether several processes run one generation together."""
    rank = 0
    size = 1

    @property
    def leads(self) -> bool:
        """Whether what the processes decide together is decided here."""
        return self.rank == 0

    def first(self, values: Sequence[int]) -> list[int]:
        """Rank 0's values; as many everywhere."""
        return list(values)

    def gathered(self, value: Any) -> list[Any]:
        """Everybody's value, by rank; anything that can be pickled."""
        return [value]

    def told(self, value: Any) -> Any:
        """Rank 0's value; anything that can be pickled."""
        return value

    def attempted(self, make: Callable[[], T], stand_in: T) -> T:
        """What rank 0 makes, which stays there; the others get a stand-in, or the same failure.

        Raises:
            ValueError: rank 0 refused to (also where it found no file); LevelError: in the others, it failed.
        """
        return make()

    def exchange(self, state: int, message: Sequence[int] = ()) -> list[int]:
        """Once a round: whether all are where rank 0 is, and what it has to say.

        Args:
            state: a number that is the same in all processes as long as they hold the same ids.
            message: rank 0's; nobody else's counts.

        Raises:
            LevelError: they are not, in all processes alike; or a process is gone.
        """
        return list(message)

    def compared(self, state: int, mark: int, failed: bool) -> tuple[bool, bool]:
        """Once a round, where every process has made the same by itself: whether it has.

        Args:
            state: see `exchange`; mark: a number that is the same where what was made is; failed: whether nothing was.

        Returns:
            Whether all marks are the same, and whether any process failed.

        Raises:
            LevelError: see `exchange`.
        """
        return True, failed


class _Group(Ranks):
    """The processes of a group.

    Args:
        group: the process group.
        device: where its collectives want their tensors.
    """

    def __init__(self, group: Any, device: torch.device) -> None:
        self.group = group
        self.device = device
        self.rank = dist.get_rank(group)
        self.size = dist.get_world_size(group)
        self._source = dist.get_global_rank(group, 0)

    def gathered(self, value: Any) -> list[Any]:
        found: list[Any] = [None] * self.size
        with talking():
            dist.all_gather_object(found, value, group=self.group)
        return found


class Spread(_Group):
    """Processes that hold a part of all weights each, and generate by themselves; each decides for itself.

    Attributes:
        put_together: has embedding and lm_head as a whole in this process (`Turns.put_together`).
    """

    put_together: Callable[[], None]

    @property
    def leads(self) -> bool:
        return True

    def greatest(self, value: int) -> int:
        """Of what all processes say at once."""
        tensor = torch.tensor([value], dtype=torch.int64, device=self.device)
        with talking():
            dist.all_reduce(tensor, dist.ReduceOp.MAX, group=self.group)
        return int(tensor)


class Team(_Group):
    """Processes that run one generation in step."""

    in_step = True

    def first(self, values: Sequence[int]) -> list[int]:
        tensor = torch.tensor(list(values), dtype=torch.int64, device=self.device)
        with talking():
            dist.broadcast(tensor, self._source, group=self.group)
        found: list[int] = tensor.tolist()
        return found

    def told(self, value: Any) -> Any:
        found = [value if self.rank == 0 else None]
        with talking():
            dist.broadcast_object_list(found, self._source, group=self.group)
        return found[0]

    def attempted(self, make: Callable[[], T], stand_in: T) -> T:
        if self.rank != 0:
            failure = self.told(None)
            if failure is None:
                return stand_in
            refused, reason = failure
            raise ValueError(reason) if refused else LevelError(f"the target: in process 0, {reason}")
        try:
            found = make()
        except Exception as error:
            self.told((isinstance(error, (ValueError, OSError)), " ".join(str(error).split())))
            raise
        self.told(None)
        return found

    def exchange(self, state: int, message: Sequence[int] = ()) -> list[int]:
        said = list(message) if self.rank == 0 else []
        count = len(said) if self.rank == 0 else _LEAST
        row = [state, -state, count, *said[:CAPACITY]]
        row += [_LEAST] * (3 + CAPACITY - len(row))
        tensor = torch.tensor(row, dtype=torch.int64, device=self.device)
        with talking():
            dist.all_reduce(tensor, dist.ReduceOp.MAX, group=self.group)
        most, least, length, *found = tensor.tolist()
        if most != -least:
            self._part(state)
        if length > CAPACITY:
            found += self.first(said[CAPACITY:] or [0] * (length - CAPACITY))
        return [int(value) for value in found[:length]]

    def compared(self, state: int, mark: int, failed: bool) -> tuple[bool, bool]:
        tensor = torch.tensor([state, -state, mark, -mark, int(failed)], dtype=torch.int64, device=self.device)
        with talking():
            dist.all_reduce(tensor, dist.ReduceOp.MAX, group=self.group)
        most, least, highest, lowest, any_failed = tensor.tolist()
        if most != -least:
            self._part(state)
        return highest == -lowest, bool(any_failed)

    def _part(self, state: int) -> NoReturn:
        states = self.gathered(state)
        others = [str(rank) for rank, one in enumerate(states) if one != states[0]]
        raise LevelError(PARTED.format(ranks=", ".join(others)))


ALONE = Ranks()


@contextmanager
def talking() -> Iterator[None]:
    """A process that is gone is one sentence, as everything that fails in the middle of a generation."""
    try:
        yield
    except Exception as error:
        reason = " ".join(str(error).split())
        raise LevelError(f"the target: a process that shares it does not answer any more: {reason}") from error


def ranks_of(model: Any, role: str = "the target") -> Ranks:
    """The processes that hold parts of a model's weights; `ALONE` where it is this process's own.

    Raises:
        ValueError: its weights are spread in a way that a chain cannot follow; the sentence names it.
    """
    inner = inner_model(model)
    named = {"role": role, "kind": type(inner).__name__}
    check_gathered(model, role)
    if not (dist.is_available() and dist.is_initialized()):
        return ALONE
    if any(_is_of("flat", module) for module in model.modules()):
        raise ValueError(FLAT.format(**named))
    spread: list[Any] = [module for module in model.modules() if is_spread_by_itself(module)]
    for module in spread:
        module.reshard()  # some are left whole after a pass
    part: Any = next((p for p in inner.parameters() if is_part(p)), None)
    if part is None or part.device_mesh.size() == 1:
        return ALONE
    mesh = part.device_mesh
    if spread:
        parted = [dim for dim, placement in enumerate(part.placements) if placement.is_shard()]
        if len(parted) != 1:
            raise ValueError(SQUARE.format(**named, dims=mesh.ndim))
        return Spread(mesh.get_group(parted[0]), _device_of(mesh))
    if mesh.ndim != 1:
        raise ValueError(SQUARE.format(**named, dims=mesh.ndim))
    _check_heads(inner, mesh.size(), named)
    return Team(mesh.get_group(), _device_of(mesh))


def check_gathered(model: Any, role: str) -> None:
    """Refuse a model of which DeepSpeed ZeRO-3 leaves this process a part only, now or from the first pass on.

    Raises:
        ValueError: in one sentence.
    """
    inner = inner_model(model)
    # Only what has one of its numbers can have been partitioned.
    marked = [parameter for parameter in parameters_of_all(inner) if hasattr(parameter, "ds_id")]
    if any(map(_is_partitioned, marked)):
        raise ValueError(PARTITIONED.format(role=role, kind=type(inner).__name__))
    if marked and _is_partitioned_again(inner):
        raise ValueError(HOOKED.format(role=role, kind=type(inner).__name__))


def _check_heads(model: Any, size: int, named: dict[str, str]) -> None:
    """Refuse a model whose attention is split in the middle of a head, which its first pass would choke on."""
    text = model.config.get_text_config(decoder=True)
    heads = getattr(text, "num_attention_heads", None)
    key_heads = getattr(text, "num_key_value_heads", None) or heads
    if not isinstance(heads, int) or not isinstance(key_heads, int) or not (heads % size or key_heads % size):
        return
    if any(is_part(parameter) and "k_proj" in name for name, parameter in model.named_parameters()):
        numbers = [str(n) for n in range(2, key_heads + 1) if heads % n == 0 and key_heads % n == 0]
        told = " or ".join(numbers) or "there is none but 1"
        raise ValueError(UNEVEN.format(**named, heads=heads, key_heads=key_heads, size=size, numbers=told))


def is_part(tensor: Any) -> bool:
    """Whether a tensor's numbers are spread over processes."""
    kind = _kinds().get("tensor")
    return kind is not None and isinstance(tensor, kind)


def own_part(tensor: Any) -> Any:
    """The numbers of a tensor that are in this process."""
    return tensor.to_local() if is_part(tensor) else tensor


def is_split(model: Any) -> bool:
    """Whether a model's passes, or its weights, need other processes."""
    if not _kinds():
        return False
    held: list[Any] = parameters_of_all(model)
    if any(is_part(parameter) and parameter.device_mesh.size() > 1 for parameter in held):
        return True
    return any(getattr(module, "needs_processes", False) for module in modules_of(model))


def is_spread(model: Any) -> bool:
    """Whether FSDP2 has been at a model or modules inside."""
    return any(is_spread_by_itself(module) for module in model.modules())


def is_spread_by_itself(module: Any) -> bool:
    """Whether FSDP2 has been at this module."""
    return _is_of("spread", module)


def _is_of(name: str, module: Any) -> bool:
    """Whether FSDP2 ("spread") or FSDP1 ("flat") has been at a module."""
    kind = _kinds().get(name)
    return kind is not None and isinstance(module, kind)


def _is_partitioned(parameter: Any) -> bool:
    """Whether this is what ZeRO-3 leaves of a weight where it has not been gathered: nothing, and its true shape."""
    return hasattr(parameter, "ds_id") and parameter.numel() == 0 and getattr(parameter, "ds_numel", 1) > 0


def _is_partitioned_again(model: Any) -> bool:
    """Whether what partitioned the weights is called in every pass: by its own hooks, on modules inside."""
    own = (parameter for parameter in model.parameters() if hasattr(parameter, "ds_id"))
    parting = next((one.partition for one in own if not getattr(one, "ds_persist", False)), None)
    if parting is None:
        return False  # of ZeRO-3's no weight, or those alone that are small enough to stay whole
    inside = (module for module in model.modules() if module is not model)
    return any(_package(hook) == _package(parting) for module in inside for hook in module._forward_pre_hooks.values())


def _package(function: Any) -> str:
    return str(getattr(function, "__module__", None) or id(function)).partition(".")[0]


def _device_of(mesh: Any) -> torch.device:
    return torch.device("cpu") if mesh.device_type == "cpu" else torch.device(mesh.device_type, _current(mesh))


def _current(mesh: Any) -> int:
    return int(torch.get_device_module(mesh.device_type).current_device())


@lru_cache(maxsize=1)
def _loaded() -> dict[str, Any]:
    """Classes that models in several processes are made of; read once such a process is seen."""
    from torch.distributed import fsdp
    from torch.distributed.tensor import DTensor

    found = {"tensor": DTensor, "spread": getattr(fsdp, "FSDPModule", None), "flat": fsdp.FullyShardedDataParallel}
    return {name: kind for name, kind in found.items() if kind is not None}


def _kinds() -> dict[str, Any]:
    return _loaded() if dist.is_available() and dist.is_initialized() else {}
