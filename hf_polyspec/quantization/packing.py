# SPDX-License-Identifier: Apache-2.0
"""The same float model with its matrices laid out for the CPU's multiplier: exact, opt-in, undone exactly."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar
from weakref import WeakKeyDictionary

import psutil
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_polyspec.quantization.kernels import PackedFloat, packs

Model = TypeVar("Model", bound=nn.Module)
Kept = tuple[PackedFloat, tuple[object, ...]]

# Below this many rows the unpacked float32 product is memory-bound and wins (measured, docs/quantization.md).
FLOAT32_FEW_ROWS = 4


class PackedForward:
    """Takes the place of one layer's `forward`; the layer's parameters and class stay what they are.

    Args:
        linear: The layer, its weight on the CPU.
        kept: From `kept()` of an earlier one; packed again if the weight has changed since.
    """

    def __init__(self, linear: nn.Linear, kept: Kept | None = None) -> None:
        self.linear = linear
        self._packed: PackedFloat | None = None if kept is None else kept[0]
        self._stamp: tuple[object, ...] = () if kept is None else kept[1]

    def kept(self) -> Kept | None:
        """The packed matrix and what it was packed from, None if it has not been needed yet."""
        return None if self._packed is None else (self._packed, self._stamp)

    def _current(self) -> tuple[object, ...]:
        weight, bias = self.linear.weight, self.linear.bias
        versions = tuple(-1 if t is None or t.is_inference() else t._version for t in (weight, bias))
        return (weight.data_ptr(), weight.dtype, *versions)

    def __call__(self, input: Tensor) -> Tensor:
        linear = self.linear
        weight = linear.weight
        trained = torch.is_grad_enabled() and (input.requires_grad or weight.requires_grad)
        few = weight.dtype is torch.float32 and input.numel() < FLOAT32_FEW_ROWS * input.shape[-1]
        if trained or few or input.dtype is not weight.dtype or not packs(weight):
            return F.linear(input, weight, linear.bias)
        stamp = self._current()
        if self._packed is None or stamp != self._stamp:  # first pass, or the weight was changed since
            bias = None if linear.bias is None else linear.bias.detach()
            self._packed, self._stamp = PackedFloat(weight.detach(), bias), stamp
        return self._packed(input)

    def __deepcopy__(self, memo: dict[int, object]) -> PackedForward:
        return PackedForward(copy.deepcopy(self.linear, memo))

    def __reduce__(self) -> tuple[type[PackedForward], tuple[nn.Linear]]:
        return PackedForward, (self.linear,)


def pack(model: Model) -> Model:
    """Let a model's float linear layers multiply in oneDNN's blocked layout; in place, undone by `unpack`.

    The same numbers are multiplied in another order, so outputs agree within the rounding of the dtype. Parameters,
    `state_dict` and class of every layer stay; a weight that is changed later is packed again. Costs a second copy of
    the packed matrices. Does nothing for dtypes this CPU does not multiply natively (bfloat16 without AVX512-BF16),
    on other devices, and for layers whose `forward` someone else has already replaced.

    Args:
        model: Any model.

    Returns:
        The same model.
    """
    for module in _packable(model):
        module.__dict__["forward"] = PackedForward(module)
    return model


def _packable(model: nn.Module) -> Iterator[nn.Linear]:
    for module in model.modules():
        if type(module) is nn.Linear and "forward" not in module.__dict__ and packs(module.weight):
            yield module


# Packed matrices of assistants between two generations, for as long as their layers live.
_KEPT: WeakKeyDictionary[nn.Linear, Kept] = WeakKeyDictionary()


@contextmanager
def packed_assistants(assistants: Iterable[object], target: nn.Module | None = None) -> Iterator[None]:
    """Pack the assistants of a chain while it runs; afterwards they are as they were.

    What was packed is kept for the next time. Layers shared with the target are left alone (the target's are packed
    only by `pack`), and so is everything where less than half of the memory would stay free, and compiled models.

    Args:
        assistants: Members of a chain; those that are no models are passed over.
        target: The model above them.
    """
    alone = set() if target is None else {id(module) for module in target.modules()}
    chosen: dict[int, nn.Linear] = {}
    for assistant in assistants:
        if isinstance(assistant, nn.Module) and not hasattr(assistant, "_orig_mod"):
            chosen.update((id(module), module) for module in _packable(assistant) if id(module) not in alone)
    layers = list(chosen.values())
    if not _room([layer for layer in layers if layer not in _KEPT]):
        layers = []
    for layer in layers:
        layer.__dict__["forward"] = PackedForward(layer, _KEPT.get(layer))
    try:
        yield
    finally:
        for layer in layers:
            forward = layer.__dict__.pop("forward", None)
            kept = forward.kept() if isinstance(forward, PackedForward) else None
            if kept is not None:
                _KEPT[layer] = kept


def _room(layers: Sequence[nn.Linear]) -> bool:
    size = sum(layer.weight.numel() * layer.weight.element_size() for layer in layers)
    if not size:
        return True
    memory = psutil.virtual_memory()
    return bool(memory.available - size > memory.total / 2)


def unpack(model: Model) -> Model:
    """Undo `pack` exactly; models that are not packed are left alone.

    Args:
        model: A model, packed or not.

    Returns:
        The same model.
    """
    for module in model.modules():
        if isinstance(module.__dict__.get("forward"), PackedForward):
            del module.__dict__["forward"]
    return model


def is_packed(model: nn.Module) -> bool:
    """Whether any layer of a model is packed."""
    return any(isinstance(module.__dict__.get("forward"), PackedForward) for module in model.modules())
