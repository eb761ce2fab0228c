# SPDX-License-Identifier: Apache-2.0
"""The kernels behind the quantised layers, one small callable class each, chosen by device and machine."""

from __future__ import annotations

import math
import warnings
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_polyspec.quantization.weights import QuantizedWeight

_INT4_GROUPS = (256, 128, 64, 32)
_FLOAT_ROWS = 64
_TINY = 1e-12


class Kernel(Protocol):
    """What a quantised layer calls: `[..., K]` in, `[..., N]` out, same dtype."""

    def __call__(self, x: Tensor) -> Tensor: ...


class DynamicInt8:
    """8-bit weights times 8-bit activations on the int8 dot products of an x86 CPU (fbgemm).

    Each token is scaled to [-1, 1] first, so that the kernel's single activation scale is right for all of them and
    no token sees another's range: `y = (codes(x / m) @ W8) * m`, with `m` the largest magnitude of the token.

    Args:
        weight: 8 bits, one group a row.
        bias: `[N]` or None.
    """

    def __init__(self, weight: QuantizedWeight, bias: Tensor | None) -> None:
        signed = (weight.codes.to(torch.int16) - 128).to(torch.int8)
        zeros = weight.zeros[:, 0].to(torch.int64) - 128
        with warnings.catch_warnings():
            # torch announces the end of quantised tensors; packing has no other public door yet.
            warnings.simplefilter("ignore")
            tensor = torch._make_per_channel_quantized_tensor(signed, weight.scales[:, 0].double(), zeros, 0)
            self._packed = torch.ops.quantized.linear_prepack(tensor, None)
        self._matmul = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32
        # Without VNNI pairs of products are added in 16 bits and would saturate: 7 bits of activation then.
        self._scale = 1 / 127 if torch.cpu._is_vnni_supported() else 1 / 63
        self._bias = bias

    def __call__(self, x: Tensor) -> Tensor:
        dtype = x.dtype
        wide = x if dtype is torch.float32 else x.float()
        peak = wide.abs().amax(-1, keepdim=True).clamp_min_(_TINY)  # [..., 1]
        y: Tensor = self._matmul(wide / peak, self._scale, 128, self._packed).mul_(peak)
        if self._bias is not None:
            y += self._bias
        return y if dtype is torch.float32 else y.to(dtype)


class WeightOnlyInt8:
    """8-bit weights, bfloat16 activations, on aten's `_weight_int8pack_mm`."""

    def __init__(self, weight: QuantizedWeight, bias: Tensor | None) -> None:
        centred = weight.codes.to(torch.int16) - weight.zeros.to(torch.int16)
        self._weight = centred.clamp(-128, 127).to(torch.int8).contiguous()
        self._scales = weight.scales[:, 0].to(torch.bfloat16).contiguous()
        self._bias = bias

    def __call__(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1]).to(torch.bfloat16)
        y = torch.ops.aten._weight_int8pack_mm(flat, self._weight, self._scales).to(x.dtype)
        if self._bias is not None:
            y += self._bias
        return y.view(*x.shape[:-1], -1)


class PackedInt4:
    """4-bit weights, bfloat16 activations, on aten's int4 kernel of the weight's device.

    Groups of 128 that do not divide the width run as groups of 64 or 32 with each scale repeated, which is the same
    matrix; an act-order checkpoint runs with its inputs permuted so that groups are contiguous. The kernel loses to a
    float product on many rows, so from `_FLOAT_ROWS` rows on the matrix is expanded for the pass.

    Args:
        weight: 4 bits or fewer, runnable (see `int4_run_group`).
        bias: `[N]` or None.
    """

    def __init__(self, weight: QuantizedWeight, bias: Tensor | None) -> None:
        group, order = int4_run_group(weight)
        if group is None:
            raise ValueError("This matrix cannot run on the int4 kernel.")
        codes, index = weight.codes, weight.g_idx.long()
        if order is not None:
            codes, index = codes[:, order], index[order]
        self._outputs = codes.shape[0]
        missing = -self._outputs % 16
        first = index[::group]  # [K / group], the stored group each run group lies in
        scales = weight.scales[:, first]
        # The kernel means (code - 8) * scale + shift.
        shifts = (8.0 - weight.zeros[:, first].float()) * scales
        parameters = F.pad(torch.stack([scales, shifts], -1), (0, 0, 0, 0, 0, missing))  # [N', K / group, 2]
        self._parameters = parameters.transpose(0, 1).to(torch.bfloat16).contiguous()
        padded = F.pad(codes, (0, 0, 0, missing)).to(torch.int32).contiguous()
        self._cuda = codes.is_cuda
        if self._cuda:
            high_low = (padded[:, ::2] << 4 | padded[:, 1::2]).to(torch.uint8)
            self._packed = torch.ops.aten._convert_weight_to_int4pack(high_low.contiguous(), 8)
        else:
            self._packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(padded, 1)
        self._group, self._order, self._bias, self._weight = group, order, bias, weight

    def __call__(self, x: Tensor) -> Tensor:
        rows = x.numel() // x.shape[-1]
        if rows >= _FLOAT_ROWS:
            bias = None if self._bias is None else self._bias.to(x.dtype)
            return F.linear(x, self._weight.dequantize(x.dtype), bias)
        flat = x.reshape(rows, x.shape[-1])
        if self._order is not None:
            flat = flat[:, self._order]
        flat = flat.to(torch.bfloat16)
        if self._cuda:
            y = torch.ops.aten._weight_int4pack_mm(flat, self._packed, self._group, self._parameters)
        else:
            y = torch.ops.aten._weight_int4pack_mm_for_cpu(flat, self._packed, self._group, self._parameters)
        y = y[:, : self._outputs].to(x.dtype)
        if self._bias is not None:
            y = y + self._bias
        return y.view(*x.shape[:-1], self._outputs)


class FloatKernel:
    """The dequantised matrix in float: for what no integer kernel can run. Correct, not fast."""

    def __init__(self, weight: QuantizedWeight, bias: Tensor | None) -> None:
        self._weight = weight.dequantize()
        self._bias = bias

    def __call__(self, x: Tensor) -> Tensor:
        if self._weight.dtype != x.dtype:
            self._weight = self._weight.to(x.dtype)
        return F.linear(x, self._weight, None if self._bias is None else self._bias.to(x.dtype))


def int4_run_group(weight: QuantizedWeight) -> tuple[int | None, Tensor | None]:
    """The group size the int4 kernel runs with, and the order of inputs that makes groups contiguous.

    Returns:
        The largest size of 256, 128, 64, 32 that divides the width and lies inside every stored group (None if there
        is none), and a permutation `[K]` or None where inputs are already in order.
    """
    features = weight.shape[1]
    index = weight.g_idx.long()
    order = None
    if bool((index[1:] < index[:-1]).any()):
        order = torch.argsort(index, stable=True)
        index = index[order]
    sizes = torch.bincount(index)
    common = math.gcd(features, *(int(size) for size in sizes.tolist()))
    group = next((size for size in _INT4_GROUPS if common % size == 0), None)
    return group, order


def build_int8_kernel(weight: QuantizedWeight, bias: Tensor | None) -> Kernel:
    """The fastest kernel of this machine for 8-bit weights."""
    if weight.scales.shape[1] != 1:
        return FloatKernel(weight, bias)
    if weight.codes.device.type == "cpu":
        if torch.backends.quantized.engine in ("x86", "fbgemm"):
            return DynamicInt8(weight, bias)
        return WeightOnlyInt8(weight, bias)
    return FloatKernel(weight, bias)


def build_int4_kernel(weight: QuantizedWeight, bias: Tensor | None) -> Kernel:
    """The fastest kernel of this machine for weights of 4 bits or fewer."""
    if int4_run_group(weight)[0] is None or weight.codes.device.type not in ("cpu", "cuda"):
        return FloatKernel(weight, bias)
    return PackedInt4(weight, bias)
