# SPDX-License-Identifier: Apache-2.0
"""Drop-in replacements for `nn.Linear` that compute with integer weights on the kernels that ship in torch.

Both keep the integers compactly, write GPTQ's tensors as their `state_dict()`, and build what the kernel of their
device wants on the first forward pass. Which kernel that is, and which is fast where, is in `cpu/kernels.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from hf_polyspec.integers.foreign import dequantized, stored_elsewhere
from hf_polyspec.integers.gptq_format import GPTQ_TENSORS, from_gptq, pack_codes, storable, to_gptq, unpack_codes
from hf_polyspec.integers.weights import QuantizedWeight, round_to_nearest


class Kernel(Protocol):
    """What a layer calls: `[..., K]` in, `[..., N]` out, same dtype."""

    def __call__(self, x: Tensor) -> Tensor: ...


Source = Callable[[], QuantizedWeight]
"""Makes the matrix that a kernel is built for."""


class Group(Protocol):
    """What a layer asks for its part of a joint product (see `shared_input`)."""

    def part(self, member: int, x: Tensor) -> Tensor | None: ...

    def reset(self) -> None: ...

    @property
    def built(self) -> Kernel | None: ...


class QuantizedLinear(nn.Module):
    """A linear layer over integer weights; use `Int8Linear` or `Int4Linear`.

    Args:
        weight: The quantised matrix `[N, K]`.
        bias: `[N]` or None.

    Raises:
        ValueError: The matrix does not fill whole 32-bit words (see `gptq_format.storable`).
    """

    codes: Tensor
    zeros: Tensor
    scales: Tensor
    g_idx: Tensor
    bias: Tensor | None
    activation_bits: int | None = None

    def __init__(self, weight: QuantizedWeight, bias: Tensor | None = None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        if not storable(weight.shape, weight.bits):
            raise ValueError(
                f"A linear layer of {self.in_features} inputs and {self.out_features} outputs cannot be stored with "
                f"{weight.bits} bits: the sizes must fill whole 32-bit words."
            )
        self.bits = weight.bits
        self.group_size = weight.group_size
        # 8-bit codes lie as the kernels read them; narrower ones in words, two to ten to four bytes.
        codes = weight.codes if weight.bits == 8 else pack_codes(weight.codes.t(), weight.bits)
        self.register_buffer("codes", codes.contiguous(), persistent=False)
        self.register_buffer("zeros", weight.zeros, persistent=False)
        # float16 is the format's type, and under a name of its own, so that casting the model leaves it alone.
        self.register_buffer("scales", weight.scales.to(torch.float16), persistent=False)
        self.register_buffer("g_idx", weight.g_idx, persistent=False)
        self.register_buffer("bias", None if bias is None else bias.detach().clone(), persistent=False)
        self._kernel: Kernel | None = None
        self._group: Group | None = None
        self._member = 0

    @classmethod
    def from_linear(
        cls, linear: nn.Module, bits: int, group_size: int = -1, symmetric: bool = False
    ) -> QuantizedLinear:
        """Quantise a float layer (`nn.Linear` or transformers' `Conv1D`) by rounding to the nearest code."""
        weight, bias = float_weight(linear)
        return cls(round_to_nearest(weight, bits, group_size, symmetric), bias)

    def quantized_weight(self) -> QuantizedWeight:
        """The integers and scales this layer holds."""
        codes = self.codes if self.bits == 8 else unpack_codes(self.codes, self.bits).t().contiguous()
        scales = self.scales.to(torch.float32)
        return QuantizedWeight(codes, scales, self.zeros, self.g_idx, self.bits, self.group_size)

    @property
    def symmetric(self) -> bool:
        """Whether zeros carry no information."""
        return bool((self.zeros == 1 << (self.bits - 1)).all())

    @property
    def weight(self) -> Tensor:
        """The float matrix `[N, K]` this layer stands for, built anew at every access."""
        return self.quantized_weight().dequantize()

    def bias_or_zeros(self) -> Tensor:
        """The bias `[N]`, zeros where the layer has none."""
        return self.scales.new_zeros(self.out_features) if self.bias is None else self.bias

    def build_kernel(self, source: Source, bias: Tensor | None) -> Kernel:
        """The kernel for a matrix of this layer's kind, its own or a joint one."""
        raise NotImplementedError

    @property
    def product(self) -> Group | None:
        """The joint product that computes this layer, if there is one."""
        return self._group

    def join(self, group: Group | None, member: int) -> None:
        """Take outputs from a joint product from now on, or (None) compute alone."""
        self._group, self._member, self._kernel = group, member, None

    def kernel(self) -> Kernel:
        """What computes this layer alone, built when it is first needed."""
        kernel = self._kernel
        if kernel is None:
            kernel = self._kernel = self.build_kernel(self.quantized_weight, self.bias)
        return kernel

    @property
    def built(self) -> Kernel | None:
        """What computes this layer, alone or with others; None if it has not been needed yet."""
        return self._kernel if self._group is None else self._group.built

    @torch.no_grad()
    def forward(self, input: Tensor) -> Tensor:
        """`input @ weight.T + bias`, without gradients.

        Args:
            input: `[..., K]` float32, bfloat16 or float16.

        Returns:
            `[..., N]` in the dtype of `input`.
        """
        group = self._group  # one read each: in another thread the group may fall apart
        if group is not None:
            part = group.part(self._member, input)
            if part is not None:
                return part
        return self.kernel()(input)

    def state_tensors(self, version: int = 1) -> dict[str, Tensor]:
        """The layer's tensors in a GPTQ checkpoint (`qweight`, `qzeros`, `scales`, `g_idx`, perhaps `bias`)."""
        tensors = to_gptq(self.quantized_weight(), version)
        if self.bias is not None:
            tensors["bias"] = self.bias
        return tensors

    def _save_to_state_dict(self, destination: dict[str, Tensor], prefix: str, keep_vars: bool) -> None:
        for name, tensor in self.state_tensors().items():
            destination[prefix + name] = tensor

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Tensor],
        prefix: str,
        local_metadata: dict[str, object],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        missing = [prefix + name for name in GPTQ_TENSORS if prefix + name not in state_dict]
        if missing:
            missing_keys.extend(missing)
            return
        device = self.scales.device
        tensors = {name: state_dict[prefix + name].to(device) for name in GPTQ_TENSORS}
        fresh = from_gptq(tensors, self.bits, self.group_size)
        if fresh.shape != (self.out_features, self.in_features):
            error_msgs.append(f"size mismatch for {prefix}qweight: {fresh.shape}")
            return
        bias = state_dict.get(prefix + "bias", self.bias)
        group, member, activation_bits = self._group, self._member, self.activation_bits
        QuantizedLinear.__init__(self, fresh, bias)
        self._group, self._member, self.activation_bits = group, member, activation_bits
        if group is not None:
            group.reset()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantizedLinear:
        scales = self.scales
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.scales.dtype != scales.dtype:  # cast with the model: the stored numbers must stay as they were
            self.scales = scales.to(self.scales.device)
        self._kernel = None  # packed for the old device
        if self._group is not None:
            self._group.reset()
        return self

    def __getstate__(self) -> dict[str, object]:
        # Packed weights are opaque to copy and pickle on some back ends, and quick to build again.
        return {**self.__dict__, "_kernel": None}

    def extra_repr(self) -> str:
        group = "row" if self.group_size == -1 else self.group_size
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bits={self.bits}, "
            f"group_size={group}, bias={self.bias is not None}"
        )


def float_weight(linear: nn.Module) -> tuple[Tensor, Tensor | None]:
    """Weight `[N, K]` and bias `[N]` of a linear layer; of one that another library has quantised, dequantised.

    Raises:
        TypeError: Neither an `nn.Linear`, nor a transformers `Conv1D`, nor such a layer.
        ValueError: Such a layer, and its weight cannot be had.
    """
    if not isinstance(linear, QuantizedLinear) and stored_elsewhere(linear):
        return dequantized(linear)
    weight, bias = getattr(linear, "weight", None), getattr(linear, "bias", None)
    offset = bias.detach() if isinstance(bias, Tensor) else None
    if isinstance(linear, nn.Linear):
        return linear.weight.detach(), offset
    if type(linear).__name__ == "Conv1D" and isinstance(weight, Tensor):
        return weight.detach().t(), offset
    raise TypeError(f"{type(linear).__name__} is not a linear layer that can be quantised.")


def matrix_shape(linear: nn.Module) -> tuple[int, int]:
    """`(N, K)` of what `float_weight` gives."""
    layer: Any = linear
    if not isinstance(linear, QuantizedLinear) and stored_elsewhere(linear):
        return int(layer.out_features), int(layer.in_features)
    outputs, features = float_weight(linear)[0].shape
    return outputs, features
