# SPDX-License-Identifier: Apache-2.0
"""Layers that read the same tensor (query, key and value; gate and up) computed in one product.

On few rows a linear layer of a small model costs as much in the call as in the work, and seven calls a block become
four. The first layer of a group to be called computes all of them; the others find their part waiting, as long as
they ask with the very same tensor object, unchanged.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from hf_polyspec.quantization.kernels import Kernel
from hf_polyspec.quantization.linear import QuantizedLinear
from hf_polyspec.quantization.weights import QuantizedWeight

SIBLINGS = (
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("gate_proj", "up_proj"),
    ("w1", "w3"),
)


def _version(tensor: Tensor) -> int:
    # Inference tensors count no versions; nothing of a transformers layer writes into its input between siblings.
    return -1 if tensor.is_inference() else tensor._version


class SharedInput:
    """The joint product of a group of layers.

    Args:
        layers: Quantised layers of one width, bits and grouping, usually called with the same input.
    """

    def __init__(self, layers: Sequence[QuantizedLinear]) -> None:
        self._layers = list(layers)
        self._sizes = [layer.out_features for layer in layers]
        self._kernel: Kernel | None = None
        self._waiting: tuple[Tensor, int, list[Tensor | None]] | None = None
        self._misses = 0

    def part(self, member: int, x: Tensor) -> Tensor | None:
        """Output `[..., N_member]` of one layer, or None once the layers turned out not to share their input."""
        waiting = self._waiting  # one read: another thread may replace it
        if waiting is not None and waiting[0] is x and waiting[1] == _version(x):
            found = waiting[2][member]
            if found is not None:
                waiting[2][member] = None
                if all(part is None for part in waiting[2]):
                    self._waiting, self._misses = None, 0
                return found
        if waiting is not None:
            self._misses += 1
            if self._misses > 2:
                self._dissolve()
                return None
        if self._kernel is None:
            self._kernel = self._build()
        # Callers may flatten what they get, so parts are as contiguous as a layer's own output would be.
        parts: list[Tensor | None] = [part.contiguous() for part in torch.split(self._kernel(x), self._sizes, -1)]
        own = parts[member]
        parts[member] = None
        self._waiting = (x, _version(x), parts)
        return own

    def reset(self) -> None:
        """Forget the packed weights and any waiting parts: the layers have moved."""
        self._kernel, self._waiting = None, None

    def _dissolve(self) -> None:
        self.reset()
        for layer in self._layers:
            layer.join(None, 0)

    def _merged_weight(self) -> QuantizedWeight:
        weights = [layer.quantized_weight() for layer in self._layers]
        return QuantizedWeight(
            torch.cat([weight.codes for weight in weights]),
            torch.cat([weight.scales for weight in weights]),
            torch.cat([weight.zeros for weight in weights]),
            weights[0].g_idx,
            weights[0].bits,
            weights[0].group_size,
        )

    def _build(self) -> Kernel:
        bias: Tensor | None = None
        if any(layer.bias is not None for layer in self._layers):
            bias = torch.cat([layer.bias_or_zeros() for layer in self._layers])
        return self._layers[0].build_kernel(self._merged_weight, bias)

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_kernel": None, "_waiting": None}


def _alike(layers: Sequence[QuantizedLinear]) -> bool:
    first = layers[0]
    return all(
        type(layer) is type(first)
        and (layer.in_features, layer.bits, layer.group_size) == (first.in_features, first.bits, first.group_size)
        and layer.activation_bits == first.activation_bits
        and torch.equal(layer.g_idx, first.g_idx)
        for layer in layers
    )


def share_inputs(model: nn.Module) -> int:
    """Group sibling layers that read the same input; results stay those of the single layers.

    Args:
        model: A model with quantised layers, changed in place.

    Returns:
        The number of groups made.
    """
    groups = 0
    for parent in model.modules():
        for names in SIBLINGS:
            layers = [getattr(parent, name, None) for name in names]
            found = [layer for layer in layers if isinstance(layer, QuantizedLinear)]
            if len(found) == len(names) and _alike(found):
                group = SharedInput(found)
                for member, layer in enumerate(found):
                    layer.join(group, member)
                groups += 1
    return groups
