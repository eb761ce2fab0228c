# SPDX-License-Identifier: Apache-2.0
"""The kernels behind the quantised layers, one small callable class each, and the choice between them.

Measured on two kinds of CPU (docs/quantization.md): a few rows are memory traffic, so fewest bytes win; many rows
are arithmetic, so the widest multiplier wins. Every choice below is therefore a pair, switched by the row count.
"""

from __future__ import annotations

import math
import warnings
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_polyspec.cpu.by_rows import ByRows
from hf_polyspec.cpu.compiled import compiles
from hf_polyspec.cpu.float_kernels import pack_float, packed_size, packs, room_for
from hf_polyspec.integers.linear import Kernel, Source
from hf_polyspec.integers.weights import QuantizedWeight

_INT4_GROUPS = (256, 128, 64, 32)
_TINY = 1e-12
INT8_FEW_ROWS = 12
INT4_FEW_ROWS = 16


class IntegerDot:
    """8-bit weights times integer activations on the int8 dot products of an x86 CPU.

    Each token is scaled by its own largest magnitude and written as one or two digits to the base 254,
    `x / s = high + low / 254`; the digits are rows of one integer product, `y = (high W + low W / 254) * s`.
    Integer sums are exact, so a token's output does not depend on the other tokens of the pass, which a single scale
    for the pass would break (and with it the law a verifier hands up). Two digits carry 15 bits: as good as float
    activations. One digit is faster and coarser.

    Args:
        weight: 8 bits, one group a row.
        bias: `[N]` or None.
        digits: 1 or 2.
    """

    def __init__(self, weight: QuantizedWeight, bias: Tensor | None, digits: int = 2) -> None:
        signed = (weight.codes.to(torch.int16) - 128).to(torch.int8)
        zeros = weight.zeros[:, 0].to(torch.int64) - 128
        build = OneDnnProduct if OneDnnProduct.exact_here() else FbgemmProduct
        self._matmul: IntegerProduct = build(signed, weight.scales[:, 0], zeros)
        self._digits = digits
        self._bias = None if bias is None else bias.float()

    def __call__(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1]).float()  # [R, K]
        rows, reach = flat.shape[0], self._matmul.reach
        scale = flat.abs().amax(-1, keepdim=True).clamp_min_(_TINY).div_(reach)  # [R, 1]
        steps = flat / scale
        if self._digits == 1:
            y = self._matmul(steps.round_())
        else:
            base = 2 * reach
            digits = flat.new_empty(2 * rows, flat.shape[1])  # [2R, K]
            high, low = digits[:rows], digits[rows:]
            torch.round(steps, out=high)
            torch.sub(steps, high, out=low).mul_(base).round_()
            both = self._matmul(digits)
            y = torch.add(both[:rows], both[rows:], alpha=1 / base)
        y *= scale
        if self._bias is not None:
            y += self._bias
        result: Tensor = y.to(x.dtype).view(*x.shape[:-1], -1)
        return result


class IntegerProduct(Protocol):
    """Exact products of small whole numbers: `[R, K]` float in, `digits @ weight.T` `[R, N]` float32 out."""

    reach: float
    """Largest magnitude of a digit."""

    def __call__(self, digits: Tensor) -> Tensor: ...


class OneDnnProduct:
    """`torch._int_mm`, oneDNN's product of signed bytes: three to five times float32's speed with VNNI.

    Args:
        signed: `[N, K]` int8.
        scales: `[N]` float, multiplied into the result.
        zeros: `[N]`, what counts as zero among `signed`.
    """

    reach = 127.0
    _exact: bool | None = None

    def __init__(self, signed: Tensor, scales: Tensor, zeros: Tensor) -> None:
        self._weight = signed.contiguous().t()  # [K, N], oneDNN wants the inputs of an output side by side
        self._scales = scales.float()
        self._shift = zeros.float() * self._scales if bool(zeros.any()) else None

    def __call__(self, digits: Tensor) -> Tensor:
        y = torch._int_mm(digits.to(torch.int8), self._weight) * self._scales  # [R, N]
        if self._shift is not None:
            y -= digits.sum(-1, keepdim=True) * self._shift
        return y

    @classmethod
    def exact_here(cls) -> bool:
        """Whether the product is exact on this machine, found out once with the largest digits.

        Without VNNI some kernels add pairs of products in 16 bits, where they saturate, and others are slow loops.
        """
        if cls._exact is None:
            cls._exact = False
            if torch.cpu._is_vnni_supported():
                left = torch.full((3, 64), 127, dtype=torch.int8)
                left[1], left[2, ::2] = -127, -127
                right = torch.full((32, 64), 127, dtype=torch.int8)
                right[::2], right[1::4, ::2] = -128, -128
                wanted = left.long() @ right.long().t()
                cls._exact = bool((torch._int_mm(left, right.t()).long() == wanted).all())
        return cls._exact


class FbgemmProduct:
    """The product of unsigned and signed bytes that torch's quantised tensors use.

    Args:
        signed: `[N, K]` int8.
        scales: `[N]` float, multiplied into the result.
        zeros: `[N]`, what counts as zero among `signed`.
    """

    def __init__(self, signed: Tensor, scales: Tensor, zeros: Tensor) -> None:
        with warnings.catch_warnings():
            # torch announces the end of quantised tensors; the packed kernel has no other public door yet.
            warnings.simplefilter("ignore")
            tensor = torch._make_per_channel_quantized_tensor(signed, scales.double(), zeros, 0)
            self._packed = torch.ops.quantized.linear_prepack(tensor, None)
        self._matmul = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32
        # Without VNNI pairs of products are added in 16 bits: unsigned bytes up to 127 then, 2 * 127 * 128 < 2^15.
        self._zero = 128 if torch.cpu._is_vnni_supported() else 64
        self.reach = self._zero - 1.0

    def __call__(self, digits: Tensor) -> Tensor:
        y: Tensor = self._matmul(digits, 1.0, self._zero, self._packed)
        return y


class WeightOnlyInt8:
    """8-bit weights, bfloat16 activations, on aten's `_weight_int8pack_mm`.

    Args:
        weight: 8 bits, one group a row, zeros at 128.
        bias: `[N]` or None.
    """

    def __init__(self, weight: QuantizedWeight, bias: Tensor | None) -> None:
        centred = weight.codes.to(torch.int16) - weight.zeros.to(torch.int16)
        self._weight = centred.to(torch.int8).contiguous()
        self._scales = weight.scales[:, 0].to(torch.bfloat16).contiguous()
        self._bias = None if bias is None else bias.float()

    def __call__(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1]).to(torch.bfloat16)
        y: Tensor = torch.ops.aten._weight_int8pack_mm(flat, self._weight, self._scales)
        if self._bias is not None:
            y = y + self._bias
        return y.to(x.dtype).view(*x.shape[:-1], -1)


class PackedInt4:
    """4-bit weights, bfloat16 activations, on aten's int4 kernel of the weight's device.

    Groups of 128 that do not divide the width run as groups of 64 or 32 with each scale repeated, which is the same
    matrix; an act-order checkpoint runs with its inputs permuted so that groups are contiguous.

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
        # The kernel means (code - 8) * scale + shift, in bfloat16: narrow codes are centred on 8 so that the shift
        # stays small and nothing cancels.
        centre = 1 << (weight.bits - 1)
        codes = codes + (8 - centre)
        shifts = (centre - weight.zeros[:, first].float()) * scales
        parameters = F.pad(torch.stack([scales, shifts], -1), (0, 0, 0, 0, 0, missing))  # [N', K / group, 2]
        self._parameters = parameters.transpose(0, 1).to(torch.bfloat16).contiguous()
        padded = F.pad(codes, (0, 0, 0, missing)).to(torch.int32).contiguous()
        if codes.is_cuda:
            pairs = (padded[:, ::2] << 4 | padded[:, 1::2]).to(torch.uint8).contiguous()
            # The layout holds 2, 4 or 8 tiles of 16 inputs together; the width must be a multiple.
            tiles = next(tiles for tiles in (8, 4, 2) if padded.shape[1] % (16 * tiles) == 0)
            self._packed = torch.ops.aten._convert_weight_to_int4pack(pairs, tiles)
            self._matmul = torch.ops.aten._weight_int4pack_mm
        else:
            self._packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(padded, 1)
            self._matmul = torch.ops.aten._weight_int4pack_mm_for_cpu
        self._group, self._order = group, order
        self._bias = None if bias is None else bias.float()

    def __call__(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        if self._order is not None:
            flat = flat[:, self._order]
        y: Tensor = self._matmul(flat.to(torch.bfloat16), self._packed, self._group, self._parameters)
        if y.shape[1] != self._outputs:
            y = y[:, : self._outputs]
        if self._bias is not None:
            y = y + self._bias
        return y.to(x.dtype).view(*x.shape[:-1], self._outputs)


class Dequantized:
    """Integer weights expanded to float: for many rows, and for what no integer kernel can run.

    Where the float matrix fits comfortably in memory it is kept, packed on the CPU; otherwise it is made for each
    pass and thrown away.

    Args:
        source: Gives the quantised matrix; asked again rather than kept.
        bias: `[N]` or None.
    """

    def __init__(self, source: Source, bias: Tensor | None) -> None:
        self._source, self._bias = source, bias
        self._kept: dict[torch.dtype, Kernel] = {}

    def __call__(self, x: Tensor) -> Tensor:
        kept = self._kept.get(x.dtype)
        if kept is not None:
            return kept(x)
        matrix = self._source().dequantize(x.dtype)
        bias = None if self._bias is None else self._bias.to(x.dtype)
        if room_for(matrix):
            if packs(matrix) and room_for(matrix, packed_size(matrix)):
                self._kept[x.dtype] = pack_float(matrix, bias)
            else:
                self._kept[x.dtype] = lambda y: F.linear(y, matrix, bias)
            return self._kept[x.dtype](x)  # the first pass too, so that all passes give the same numbers
        return F.linear(x, matrix, bias)


def int4_run_group(weight: QuantizedWeight) -> tuple[int | None, Tensor | None]:
    """The group size the int4 kernel runs with, and the order of inputs that makes groups contiguous.

    Returns:
        The largest size of 256, 128, 64, 32 that divides the width and every stored group (None if there is none),
        and a permutation `[K]`, or None where inputs are already in order.
    """
    common, order = _common_group(weight)
    return next((size for size in _INT4_GROUPS if common % size == 0), None), order


def _common_group(weight: QuantizedWeight) -> tuple[int, Tensor | None]:
    """The largest size that divides every stored group, and the order of inputs that makes groups contiguous."""
    index = weight.g_idx.long()
    order = None
    if bool((index[1:] < index[:-1]).any()):
        order = torch.argsort(index, stable=True)
    sizes = torch.bincount(index)
    return math.gcd(*(int(size) for size in sizes.tolist())), order


def build_int8_kernel(source: Source, bias: Tensor | None, activation_bits: int | None = None) -> Kernel:
    """The fastest kernel of this machine for 8-bit weights.

    Args:
        source: Gives the matrix, 8 bits.
        bias: `[N]` or None.
        activation_bits: None for activations as good as float, 8 to round them too.
    """
    weight = source()
    per_row = weight.scales.shape[1] == 1
    if weight.codes.device.type != "cpu" or not per_row:
        return Dequantized(source, bias)
    x86 = torch.backends.quantized.engine in ("x86", "fbgemm")
    if compiles():
        compiled = _compiled_int8(weight, bias, 1 if activation_bits == 8 else 2)
        if compiled is not None:
            return compiled
        if activation_bits is None:
            return _widened_int8(weight, bias)
    if activation_bits == 8 and x86:
        # without VNNI one digit holds less than 8 bits
        return IntegerDot(weight, bias, digits=1 if torch.cpu._is_vnni_supported() else 2)
    if not weight.symmetric:
        return IntegerDot(weight, bias) if x86 else Dequantized(source, bias)
    few = WeightOnlyInt8(weight, bias)
    if not x86:
        return few
    return ByRows(few, lambda: IntegerDot(source(), bias), INT8_FEW_ROWS)


def _compiled_int8(weight: QuantizedWeight, bias: Tensor | None, digits: int) -> Kernel | None:
    """The product for any number of rows, on CPUs with dot products of bytes."""
    from hf_polyspec.cpu.compiled.digits import WIDEST, DigitProduct
    from hf_polyspec.cpu.compiled.dots import has_dots

    if not has_dots() or weight.codes.shape[1] > WIDEST:
        return None
    return DigitProduct(weight.codes, weight.zeros[:, 0], weight.scales[:, 0], bias, digits)


def _compiled_int4(weight: QuantizedWeight, bias: Tensor | None) -> Kernel | None:
    """The product for any number of rows, on CPUs with dot products of bytes and for groups that fill registers."""
    from hf_polyspec.cpu.compiled.dots import has_dots
    from hf_polyspec.cpu.compiled.groups import GRAIN, WIDEST, GroupProduct

    common, order = _common_group(weight)
    group = common if common <= WIDEST else math.gcd(common, WIDEST)
    if not has_dots() or group % GRAIN:
        return None
    index, codes = weight.g_idx.long(), weight.codes
    if order is not None:
        index, codes = index[order], codes[:, order]
    first = index[::group]  # [K / group], the stored group each run group lies in
    return GroupProduct(codes, weight.zeros[:, first], weight.scales[:, first], bias, order)


def _widened_int8(weight: QuantizedWeight, bias: Tensor | None) -> Kernel:
    from hf_polyspec.cpu.compiled.product import CompiledProduct

    signed = (weight.codes.to(torch.int16) - 128).to(torch.int8)
    zeros = None if weight.symmetric else weight.zeros[:, 0].float() - 128
    return CompiledProduct(signed, bias, weight.scales[:, 0], zeros)


def build_int4_kernel(source: Source, bias: Tensor | None) -> Kernel:
    """The fastest kernel of this machine for weights of 4 bits or fewer.

    Where nothing is compiled for it, few rows are multiplied in bfloat16 and many as floats: what a row gets depends
    on how many stand beside it then, which `notes` tells the user.
    """
    weight = source()
    device = weight.codes.device.type
    if device == "cpu" and compiles():
        compiled = _compiled_int4(weight, bias)
        if compiled is not None:
            return compiled
    if device not in ("cpu", "cuda") or int4_run_group(weight)[0] is None:
        return Dequantized(source, bias)
    if device == "cuda" and torch.cuda.get_device_capability(weight.codes.device) < (8, 0):
        return Dequantized(source, bias)
    return ByRows(PackedInt4(weight, bias), lambda: Dequantized(source, bias), INT4_FEW_ROWS)
