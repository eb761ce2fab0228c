# SPDX-License-Identifier: Apache-2.0
"""Sibling layers with integer weights in one product (see `joint_product`)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from hf_polyspec.cpu.joint_product import SIBLINGS, JointProduct
from hf_polyspec.integers.linear import Kernel, QuantizedLinear
from hf_polyspec.integers.weights import QuantizedWeight


class SharedInput(JointProduct):
    """The joint product of a group of layers.

    Args:
        layers: Quantised layers of one width, bits and grouping, usually called with the same input.
    """

    layers: list[QuantizedLinear]

    def __init__(self, layers: Sequence[QuantizedLinear]) -> None:
        super().__init__(layers)
        self._kernel: Kernel | None = None

    def kernel(self) -> Kernel:
        """The joint matrix, packed when it is first needed."""
        kernel = self._kernel  # one read: another thread may reset it
        if kernel is None:
            kernel = self._kernel = self._build()
        return kernel

    @property
    def built(self) -> Kernel | None:
        """The joint kernel if it has been needed."""
        return self._kernel

    def reset(self) -> None:
        """Forget the packed weights and any waiting parts: the layers have moved."""
        self._kernel = None
        self._waiting.clear()

    def dissolve(self) -> None:
        """Let every layer compute alone again."""
        super().dissolve()
        self._kernel = None
        for layer in self.layers:
            layer.join(None, 0)

    def _merged_weight(self) -> QuantizedWeight:
        weights = [layer.quantized_weight() for layer in self.layers]
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
        if any(layer.bias is not None for layer in self.layers):
            bias = torch.cat([layer.bias_or_zeros() for layer in self.layers])
        return self.layers[0].build_kernel(self._merged_weight, bias)

    def __getstate__(self) -> dict[str, object]:
        return {**super().__getstate__(), "_kernel": None}


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
