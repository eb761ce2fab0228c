# SPDX-License-Identifier: Apache-2.0
"""Layers that read the same tensor (query, key and value; gate and up) computed in one product.

On few rows a linear layer of a small model costs as much in the call as in the work, and seven calls a block become
four. The first layer of a group to be called computes all of them; the others find their part waiting, as long as
they ask in the same thread with the very same tensor object, unchanged.
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import is_
from threading import get_ident
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from hf_polyspec.integers.linear import Kernel

if TYPE_CHECKING:
    from hf_polyspec.integers.linear import QuantizedLinear

SIBLINGS = (
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("gate_proj", "up_proj"),
    ("w1", "w3"),
)


def change_count(tensor: Tensor) -> int:
    """How often torch has seen a tensor written to in place; always -1 for inference tensors, which count nothing."""
    return -1 if tensor.is_inference() else tensor._version


_SAMPLE = 128
"""Bytes at the beginning, in the middle and at the end of a weight that are compared in every pass."""


def sampled(tensor: Tensor, whole: bool = True) -> tuple[tuple[int, int], ...]:
    """Addresses and sizes of what is compared of a contiguous tensor; only its beginning if not `whole`."""
    start, size = tensor.data_ptr(), tensor.nbytes
    some = min(_SAMPLE, size)
    if not whole:
        return ((start, some),)
    return (start, some), (start + (size - some) // 2, some), (start + size - some, some)


class JointProduct:
    """The outputs of a group of layers from one product; subclasses say what multiplies.

    Args:
        layers: The layers.
    """

    layers: Sequence[nn.Module]
    looks_at_weights = False
    """Whether `kernel` compares the layers' weights with those it was made from."""

    def __init__(self, layers: Sequence[nn.Linear] | Sequence[QuantizedLinear]) -> None:
        self.layers = list(layers)
        self._sizes = [layer.out_features for layer in layers]
        self._waiting: dict[int, tuple[Tensor, int, list[Tensor | None]]] = {}  # by thread
        self._misses = 0
        self.dissolved = False

    def kernel(self) -> Kernel | None:
        """What multiplies all of the layers' weights as they are now, None where there can be no such thing."""
        raise NotImplementedError

    def unchanged(self, member: int) -> bool:
        """Whether one layer's weights are still those that the parts which wait were computed with."""
        return True

    def consists_of(self, layers: Sequence[nn.Module]) -> bool:
        """Whether these are the layers, in this order."""
        return not self.dissolved and len(layers) == len(self.layers) and all(map(is_, layers, self.layers))

    def takes(self, dtype: torch.dtype, rows: int) -> bool:
        """Whether the joint product is the way to compute with so many rows of a dtype."""
        return True

    def part(self, member: int, x: Tensor) -> Tensor | None:
        """Output `[..., N_member]` of one layer, or None once the layers turned out not to share their input."""
        # Where inputs count no changes: nothing of a transformers layer writes into its input between siblings.
        thread = get_ident()
        waiting = self._waiting.get(thread)
        if waiting is not None and waiting[0] is x and waiting[1] == change_count(x) and self.unchanged(member):
            found = waiting[2][member]
            if found is not None:
                waiting[2][member] = None
                if all(part is None for part in waiting[2]):
                    self._waiting.pop(thread, None)
                    self._misses = 0
                return found
        if waiting is not None:
            self._misses += 1
            if self._misses > 2:
                self.dissolve()
        kernel = None if self.dissolved else self.kernel()
        if kernel is None:
            return None
        if len(self._sizes) == 1:
            return kernel(x)
        # Callers may flatten what they get, so parts are as contiguous as a layer's own output would be.
        parts: list[Tensor | None] = [part.contiguous() for part in torch.split(kernel(x), self._sizes, -1)]
        own = parts[member]
        parts[member] = None
        self._waiting[thread] = (x, change_count(x), parts)
        return own

    def dissolve(self) -> None:
        """Compute nothing together any more: the layers do not share their input."""
        self.dissolved = True
        self._waiting.clear()

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_waiting": {}}
