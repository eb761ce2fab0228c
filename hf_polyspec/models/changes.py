# SPDX-License-Identifier: Apache-2.0
"""Whether a model has changed since something was made of it."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from ctypes import c_char
from operator import attrgetter, methodcaller
from typing import Any, Protocol

from torch import Tensor, nn

from ..cpu.joint_product import change_count, sampled
from ..host.states import plain_settings
from ..host.walking import modules_of, parameters_of_all

_COMPILED = "hf_polyspec.cpu.compiled.samples"
# Of hundreds of tensors, which are not in the processor's cache after a pass: each is looked up in one piece.
_address, _strides = methodcaller("data_ptr"), methodcaller("stride")
_kind, _uncounted = attrgetter("_version", "shape", "dtype", "device"), attrgetter("shape", "dtype", "device")


class Stamp:
    """What a model is now, as far as a copy of it depends on that: weights (where and how they lie, torch's counts of
    writes, some of their numbers), their type and place, modules, adapters, training. Nothing of the model is kept
    alive.

    Asked before every call, so all of a kind is compared as one list.

    Args:
        model: that something was made of.
        unsaved: whether that counts too which no checkpoint's weights hold: all buffers, the fractions that modules
            compute with, the config. Some models set some of it anew by themselves while they run, as the frequencies
            of a `dynamic` RoPE.
    """

    def __init__(self, model: Any, *, unsaved: bool = True) -> None:
        self._unsaved = unsaved
        modules = modules_of(model)
        tensors = _tensors(model, modules, unsaved)
        self._facts = _facts(modules, tensors)
        self._names = _names_of_fractions(modules) if unsaved else []
        self._unsaid = self._unsaid_of(model, modules)
        self._samples: _Samples = _Read([place for tensor in tensors for place in _places(tensor)])

    def holds(self, model: Any) -> bool:
        """Whether the model still is what it was."""
        modules = modules_of(model)
        # Numbers last: the others make sure that they lie where they lay.
        if _facts(modules, _tensors(model, modules, self._unsaved)) != self._facts or not self._samples.same():
            return False
        if self._unsaid_of(model, modules) != self._unsaid:
            return False
        compiled: Any = sys.modules.get(_COMPILED)
        # What compares all of them at once takes a second to compile where nothing else has needed it.
        if isinstance(self._samples, _Read) and compiled is not None and compiled.is_loaded():
            self._samples = compiled.Samples(self._samples.places)
        return True

    def _unsaid_of(self, model: Any, modules: Sequence[nn.Module]) -> list[Any]:
        """What a model computes with that is in no tensor."""
        if not self._unsaved:
            return []
        found = [modules[i].__dict__.get(name) for i, name in self._names]
        return [*plain_settings(model), [one if type(one) is float else None for one in found]]


class _Samples(Protocol):
    def same(self) -> bool: ...


class _Read:
    """Some bytes of a process, read one piece after another; see `Samples`."""

    def __init__(self, places: Sequence[tuple[int, int]]) -> None:
        self.places = places
        self._pieces = [(c_char * size).from_address(address) for address, size in places]
        self._kept = b"".join(self._pieces)

    def same(self) -> bool:
        return b"".join(self._pieces) == self._kept


def _facts(modules: Sequence[nn.Module], tensors: Sequence[Tensor]) -> tuple[list[Any], ...]:
    """What can be compared and keeps nothing alive."""
    own = [module.__dict__ for module in modules]
    adapting = {kind for kind in set(map(type, modules)) if _adapts(kind)}
    return (
        list(map(id, modules)),
        list(map(id, map(type, modules))),
        [module.training for module in modules],  # a compiled one asks the module inside
        ["forward" in state for state in own],
        [_adapters(module) for module in modules if type(module) in adapting] if adapting else [],
        list(map(id, tensors)),
        list(map(_address, tensors)),
        list(map(_strides, tensors)),
        _kinds(tensors),
    )


def _kinds(tensors: Sequence[Tensor]) -> list[Any]:
    """Shape, type and place of each, and how often it was written to."""
    try:
        return list(map(_kind, tensors))
    except RuntimeError:  # inference tensors count nothing
        return [(change_count(tensor), *_uncounted(tensor)) for tensor in tensors]


def _tensors(model: Any, modules: Iterable[nn.Module], unsaved: bool) -> list[Tensor]:
    found: list[Tensor] = [*parameters_of_all(model)]
    for module in [one for one in modules if one._buffers]:
        left_out = () if unsaved else module._non_persistent_buffers_set
        found += [one for name, one in module._buffers.items() if one is not None and name not in left_out]
    return found


def _names_of_fractions(modules: Sequence[nn.Module]) -> list[tuple[int, str]]:
    """Which module computes with which, as norms do and attention."""
    return [
        (i, name) for i, module in enumerate(modules) for name, value in module.__dict__.items() if type(value) is float
    ]


def _adapts(kind: Any) -> bool:
    return hasattr(kind, "active_adapters") and hasattr(kind, "merge") and hasattr(kind, "unmerge")


def _adapters(module: Any) -> tuple[Any, ...]:
    scaling = getattr(module, "scaling", None)
    factors = {name: value for name, value in scaling.items() if type(value) is float} if type(scaling) is dict else {}
    names = (_named(module, name) for name in ("active_adapters", "merged_adapters"))
    return (module.disable_adapters, factors, *names)


def _named(module: Any, name: str) -> tuple[str, ...]:
    found = getattr(module, name, ())
    return (found,) if isinstance(found, str) else tuple(found)


def _places(tensor: Tensor) -> tuple[tuple[int, int], ...]:
    """Where a few numbers of a tensor lie that this process can read."""
    plain = type(tensor) in (Tensor, nn.Parameter) and tensor.device.type == "cpu" and tensor.is_contiguous()
    return sampled(tensor) if plain and tensor.numel() and tensor.data_ptr() else ()  # memory may have been given back
