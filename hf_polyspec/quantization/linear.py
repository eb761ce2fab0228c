# SPDX-License-Identifier: Apache-2.0
"""Drop-in replacements for `nn.Linear` that compute with integer weights on the kernels that ship in torch.

Both keep the integers compactly, write GPTQ's tensors as their `state_dict()`, and build what the kernel of their
device wants on the first forward pass. Which kernel that is, and which is fast where, is in `cpu/kernels.py`.
"""

from __future__ import annotations

from torch import Tensor, nn

from hf_polyspec.cpu.kernels import build_int4_kernel, build_int8_kernel
from hf_polyspec.integers.linear import Kernel, QuantizedLinear, Source
from hf_polyspec.integers.weights import QuantizedWeight


class Int8Linear(QuantizedLinear):
    """A linear layer with 8-bit weights, one scale an output feature.

    Args:
        weight: The quantised matrix `[N, K]`, 8 bits.
        bias: `[N]` or None.
        activation_bits: None for activations as good as float, 8 to round each token to 8 bits (faster, coarser).
    """

    def __init__(self, weight: QuantizedWeight, bias: Tensor | None = None, activation_bits: int | None = None) -> None:
        super().__init__(weight, bias)
        self.activation_bits = activation_bits

    @classmethod
    def from_linear(
        cls, linear: nn.Module, bits: int = 8, group_size: int = -1, symmetric: bool = True
    ) -> QuantizedLinear:
        """Quantise a float layer to 8 bits, one scale an output feature."""
        return super().from_linear(linear, bits, group_size, symmetric)

    def build_kernel(self, source: Source, bias: Tensor | None) -> Kernel:
        return build_int8_kernel(source, bias, self.activation_bits)


class Int4Linear(QuantizedLinear):
    """A linear layer with 4-bit weights (2 and 3 bits run on the same kernel), a scale and zero a group of inputs."""

    @classmethod
    def from_linear(
        cls, linear: nn.Module, bits: int = 4, group_size: int = 128, symmetric: bool = False
    ) -> QuantizedLinear:
        """Quantise a float layer to 4 bits in groups."""
        return super().from_linear(linear, bits, group_size, symmetric)

    def build_kernel(self, source: Source, bias: Tensor | None) -> Kernel:
        return build_int4_kernel(source, bias)


def quantized_linear(weight: QuantizedWeight, bias: Tensor | None = None) -> QuantizedLinear:
    """The layer class that runs a quantised matrix."""
    return Int8Linear(weight, bias) if weight.bits == 8 else Int4Linear(weight, bias)
