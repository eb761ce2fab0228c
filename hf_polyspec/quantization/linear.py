# SPDX-License-Identifier: Apache-2.0
"""Drop-in replacements for `nn.Linear` that compute with integer weights on the kernels that ship in torch.

Both keep their weight in GPTQ's layout (so `state_dict()` is a checkpoint) and build what the kernel of the
device wants on the first forward pass. Which kernel that is, and which is fast where, is in `kernels.py`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from hf_polyspec.quantization.gptq_format import from_gptq, storable, to_gptq
from hf_polyspec.quantization.kernels import Kernel, build_int4_kernel, build_int8_kernel
from hf_polyspec.quantization.weights import QuantizedWeight, round_to_nearest


class QuantizedLinear(nn.Module):
    """A linear layer over integer weights; use `Int8Linear` or `Int4Linear`.

    Args:
        weight: The quantised matrix `[N, K]`.
        bias: `[N]` or None.
        version: How zeros are stored in the buffers, 1 (AutoGPTQ) or 2.

    Raises:
        ValueError: The matrix does not fill whole 32-bit words (see `gptq_format.storable`).
    """

    qweight: Tensor
    qzeros: Tensor
    scales: Tensor
    g_idx: Tensor

    def __init__(self, weight: QuantizedWeight, bias: Tensor | None = None, version: int = 1) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        if not storable(weight.shape, weight.bits):
            raise ValueError(
                f"A linear layer of {self.in_features} inputs and {self.out_features} outputs cannot be stored with "
                f"{weight.bits} bits: both must be multiples of {32 // weight.bits}."
            )
        self.bits = weight.bits
        self.group_size = weight.group_size
        self.version = version
        for name, tensor in to_gptq(weight, version).items():
            self.register_buffer(name, tensor)
        self.register_buffer("bias", None if bias is None else bias.detach().clone())
        self._kernel: Kernel | None = None

    @classmethod
    def from_linear(
        cls, linear: nn.Module, bits: int, group_size: int = -1, symmetric: bool = False
    ) -> QuantizedLinear:
        """Quantise a float layer (`nn.Linear` or transformers' `Conv1D`) by rounding to the nearest code."""
        weight, bias = float_weight(linear)
        return cls(round_to_nearest(weight, bits, group_size, symmetric), bias)

    def quantized_weight(self) -> QuantizedWeight:
        """The integers and scales this layer holds."""
        tensors = {name: getattr(self, name) for name in ("qweight", "qzeros", "scales", "g_idx")}
        return from_gptq(tensors, self.bits, self.group_size, self.version)

    @property
    def weight(self) -> Tensor:
        """The float matrix `[N, K]` this layer stands for, built anew at every access."""
        bias: Tensor | None = self.bias
        return self.quantized_weight().dequantize(torch.float32 if bias is None else bias.dtype)

    def _build(self) -> Kernel:
        raise NotImplementedError

    def forward(self, input: Tensor) -> Tensor:
        """`input @ weight.T + bias`, any leading shape, float32, bfloat16 or float16.

        Args:
            input: `[..., K]`.

        Returns:
            `[..., N]` in the dtype of `input`.
        """
        kernel = self._kernel
        if kernel is None:
            kernel = self._kernel = self._build()
        return kernel(input)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantizedLinear:
        # Moved or cast: the packed form belongs to the old device. Scales stay float16, the format's type.
        scales = self.scales
        super()._apply(fn, recurse)
        if self.scales.dtype != torch.float16:
            self.scales = scales.to(device=self.scales.device)
        self._kernel = None
        return self

    def __getstate__(self) -> dict[str, object]:
        # Packed weights are opaque to copy and pickle on some back ends, and quick to build again.
        state = dict(self.__dict__)
        state["_kernel"] = None
        return state

    def extra_repr(self) -> str:
        group = "row" if self.group_size == -1 else self.group_size
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bits={self.bits}, "
            f"group_size={group}, bias={self.bias is not None}"
        )


class Int8Linear(QuantizedLinear):
    """A linear layer with 8-bit weights, one scale an output feature.

    On CPUs with int8 dot products (AVX512-VNNI and later) activations are rounded to 8 bits too, each token with its
    own scale: the sum is then an exact integer, so a token's output does not depend on which other tokens share the
    pass. Elsewhere only weights are integers (`_weight_int8pack_mm`).
    """

    @classmethod
    def from_linear(
        cls, linear: nn.Module, bits: int = 8, group_size: int = -1, symmetric: bool = True
    ) -> QuantizedLinear:
        """Quantise a float layer to 8 bits, one scale an output feature."""
        return super().from_linear(linear, bits, group_size, symmetric)

    def _build(self) -> Kernel:
        return build_int8_kernel(self.quantized_weight(), self.bias)


class Int4Linear(QuantizedLinear):
    """A linear layer with 4-bit weights (2 and 3 bits run on the same kernel), a scale and zero a group of inputs."""

    @classmethod
    def from_linear(
        cls, linear: nn.Module, bits: int = 4, group_size: int = 128, symmetric: bool = False
    ) -> QuantizedLinear:
        """Quantise a float layer to 4 bits in groups."""
        return super().from_linear(linear, bits, group_size, symmetric)

    def _build(self) -> Kernel:
        return build_int4_kernel(self.quantized_weight(), self.bias)


def float_weight(linear: nn.Module) -> tuple[Tensor, Tensor | None]:
    """Weight `[N, K]` and bias `[N]` of a float linear layer.

    Raises:
        TypeError: Neither an `nn.Linear` nor a transformers `Conv1D`.
    """
    if isinstance(linear, nn.Linear):
        return linear.weight.detach(), None if linear.bias is None else linear.bias.detach()
    if type(linear).__name__ == "Conv1D" and isinstance(getattr(linear, "weight", None), Tensor):
        bias = linear.bias
        return linear.weight.detach().t(), bias.detach() if isinstance(bias, Tensor) else None
    raise TypeError(f"{type(linear).__name__} is not a linear layer that can be quantised.")
