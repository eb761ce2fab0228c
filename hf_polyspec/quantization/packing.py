# SPDX-License-Identifier: Apache-2.0
"""The same float model with its matrices laid out for the CPU's multiplier: exact, opt-in, undone exactly."""

from __future__ import annotations

import copy
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_polyspec.quantization.kernels import PackedFloat, packs

Model = TypeVar("Model", bound=nn.Module)

# Below this many rows the unpacked float32 product is memory-bound and wins (measured, docs/quantization.md).
FLOAT32_FEW_ROWS = 4


class PackedForward:
    """Takes the place of one layer's `forward`; the layer's parameters and class stay what they are.

    Args:
        linear: The layer, its weight on the CPU.
    """

    def __init__(self, linear: nn.Linear) -> None:
        self.linear = linear
        self._packed: PackedFloat | None = None
        self._stamp: tuple[object, ...] = ()

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
    for module in model.modules():
        if type(module) is nn.Linear and "forward" not in module.__dict__ and packs(module.weight):
            module.__dict__["forward"] = PackedForward(module)
    return model


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
