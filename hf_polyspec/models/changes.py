# SPDX-License-Identifier: Apache-2.0
"""Whether a model has changed since something was made of it."""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from ctypes import string_at
from typing import Any

from torch import Tensor, nn

from ..cpu.joint_product import change_count, sampled


def stamp(model: Any, *, unsaved: bool = True) -> Hashable:
    """Changes whenever what a copy would compute does: weights (where they lie, torch's counts of writes, some of their
    numbers), their type and place, modules, adapters, training.

    Args:
        model: that something was made of.
        unsaved: whether buffers count that no checkpoint holds. Some models set them anew by themselves while they run,
            as the frequencies of a `dynamic` RoPE.
    """
    marks: list[Hashable] = []
    for module in model.modules():
        marks.append((id(module), module.training, "forward" in module.__dict__, *_adapters(module)))
        marks.extend(_mark(tensor) for tensor in _tensors(module, unsaved))
    return tuple(marks)


def _tensors(module: nn.Module, unsaved: bool) -> Iterator[Tensor]:
    yield from (one for one in module._parameters.values() if one is not None)
    left_out = () if unsaved else module._non_persistent_buffers_set
    yield from (one for name, one in module._buffers.items() if one is not None and name not in left_out)


def _adapters(module: Any) -> tuple[Hashable, ...]:
    kind = type(module)
    if not (hasattr(kind, "active_adapters") and hasattr(kind, "merge") and hasattr(kind, "unmerge")):
        return ()
    return (module.disable_adapters, *(_named(module, name) for name in ("active_adapters", "merged_adapters")))


def _named(module: Any, name: str) -> tuple[str, ...]:
    found = getattr(module, name, ())
    return (found,) if isinstance(found, str) else tuple(found)


def _mark(tensor: Tensor) -> Hashable:
    plain = type(tensor) in (Tensor, nn.Parameter) and tensor.device.type == "cpu" and tensor.is_contiguous()
    sample = tuple(string_at(*place) for place in sampled(tensor)) if plain and tensor.numel() else ()
    return (id(tensor), tensor.data_ptr(), change_count(tensor), tensor.dtype, tensor.device, sample)
