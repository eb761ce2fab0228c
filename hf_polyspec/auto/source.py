# SPDX-License-Identifier: Apache-2.0
"""The model that copies are made of: which one it is, and whether it may be copied."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from ..cpu.packing import is_packing
from ..host.hooks import is_hooked
from ..host.ranks import is_split, own_part, ranks_of
from ..host.release import inner_model, is_compiled
from ..host.walking import modules_of

_NUMBERS = 8
"""Numbers of every weight that its identity is made of."""
PACKED, MAY, AS_IT_IS = "packed", "may be packed", "as it is"
_VOLATILE = ("_name_or_path", "transformers_version", "dtype", "torch_dtype", "_attn_implementation_autoset")

_identities: WeakKeyDictionary[Any, str] = WeakKeyDictionary()


def identity_of(model: Any) -> str:
    """Which weights these are: of the configuration, the shapes and some numbers of every weight but adapters'.

    It is found once for as long as the model lives, so that training or merging an adapter does not change it, and is
    the same for a checkpoint loaded in another type. Of a model that processes share it is of the part that is here,
    and of how many they are: passes take another time than in one process.

    Returns:
        16 hexadecimal digits.
    """
    inner = inner_model(model)
    if inner not in _identities:
        config = inner.config.to_dict() if hasattr(inner.config, "to_dict") else {}
        told = {name: value for name, value in config.items() if name not in _VOLATILE}
        shared = [ranks_of(inner).size] if is_split(inner) else []
        facts = [type(inner).__name__, told, *shared]
        found = hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode())
        for name, weight in _base_weights(inner):
            found.update(f"{name} {tuple(weight.shape)}".encode())
            found.update(_numbers(weight))
        _identities[inner] = found.hexdigest()[:16]
    return _identities[inner]


def _numbers(weight: Tensor) -> bytes:
    """A few numbers, rounded to 16 bits: a checkpoint is the same in any type that it is loaded in."""
    if weight.device.type == "meta" or not weight.is_floating_point():
        return b""
    flat = own_part(weight.detach()).reshape(-1)
    some = flat[:: max(1, flat.numel() // _NUMBERS)][:_NUMBERS]
    # A copy: what numpy looks into can never be resized again, as those do who gather weights for a call.
    return bytes(some.to(torch.bfloat16, copy=True).view(torch.int16).cpu().numpy().tobytes())


def _base_weights(model: Any) -> Iterator[tuple[str, Tensor]]:
    """Weights by name as they were called before adapters were put around their layers."""
    of_adapters: set[int] = set()
    for module in model.modules():
        if _is_adapter(module):
            base: Any = module.get_base_layer()
            own = {id(parameter) for parameter in base.parameters()}
            of_adapters |= {id(parameter) for parameter in module.parameters()} - own
    for name, parameter in model.named_parameters():
        if id(parameter) not in of_adapters:
            yield name.replace(".base_layer", ""), parameter


def _is_adapter(module: Any) -> bool:
    return callable(getattr(module, "get_base_layer", None)) and callable(getattr(module, "unmerge", None))


def layout_of(model: Any) -> str:
    """What packing has to do with a model as it is now, since its passes take other times in each case.

    A packed copy of its modules computes the same, and nobody misses the original's being called, unless there are
    hooks but the host's own, functions put in the place of a `forward` or compiled parts, which belong to the object
    that they were put on; a model that trains draws.

    Returns:
        `PACKED`, `MAY` or `AS_IT_IS`.
    """
    if is_compiled(model) or is_split(model):
        return AS_IT_IS
    found = MAY
    for module in modules_of(model):
        state = module.__dict__
        if "forward" in state and is_packing(state["forward"]):
            return PACKED
        off = any(weight is not None and not weight.is_cpu for weight in module._parameters.values())
        if module.training or "forward" in state or is_hooked(module) or off:
            found = AS_IT_IS
    return found
