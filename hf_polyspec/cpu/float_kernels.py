# SPDX-License-Identifier: Apache-2.0
"""Products with float matrices in the CPU's own layouts, for `pack` and for integer weights expanded to float."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from hf_polyspec.cpu.compiled import compiles
from hf_polyspec.cpu.memory import half_stays_free
from hf_polyspec.integers.linear import Kernel


class PackedFloat:
    """A float matrix in the blocked layout of oneDNN: the same product with better memory access on many rows.

    Args:
        weight: `[N, K]` on the CPU.
        bias: `[N]` in the same dtype, or None.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight, None)
        self._bias = bias

    def __call__(self, x: Tensor) -> Tensor:
        y: Tensor = torch.ops.mkldnn._linear_pointwise(x, self._weight, self._bias, "none", [], "")
        return y


class WidenedFloat:
    """A 16-bit matrix multiplied in float32, for CPUs without instructions for its dtype.

    The same numbers as in the plain product, added in float32 and rounded to 16 bits once at the end.

    Args:
        weight: `[N, K]` bfloat16 or float16 on the CPU.
        bias: `[N]` in the same dtype, or None.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self._product = PackedFloat(weight.float(), None if bias is None else bias.float())

    def __call__(self, x: Tensor) -> Tensor:
        return self._product(x.float()).to(x.dtype)


def packs(matrix: Tensor) -> bool:
    """Whether `pack_float` makes a matrix faster here: on the CPU, in a float dtype of at most 32 bits."""
    if matrix.device.type != "cpu" or not matrix.numel() or not torch._C._has_mkldnn:
        return False
    return multiplies(matrix.dtype) or (matrix.dtype in (torch.bfloat16, torch.float16) and _widens())


@cache
def _widens() -> bool:
    # Other CPUs than x86 have 16-bit instructions that torch does not report: theirs are left alone.
    return "AVX" in torch.backends.cpu.get_cpu_capability()


@cache
def multiplies(dtype: torch.dtype) -> bool:
    """Whether this CPU has instructions for products of a float dtype, and oneDNN uses them."""
    if dtype is torch.bfloat16:
        return bool(torch.cpu._is_avx512_bf16_supported()) and torch._C._has_mkldnn and _is_multiplied(dtype)
    return dtype is torch.float32


def _is_multiplied(dtype: torch.dtype) -> bool:
    """Whether oneDNN multiplies a dtype here, found out by trying: it may have been told of an older CPU.

    `ONEDNN_MAX_CPU_ISA` tells it so, and nothing of torch's says what it was told.
    """
    row = torch.ones(1, 1, dtype=dtype, device="cpu")
    try:
        PackedFloat(row, None)(row)
    except RuntimeError:
        return False
    return True


def pack_float(weight: Tensor, bias: Tensor | None) -> Kernel:
    """What multiplies a float matrix `[N, K]` fastest on this CPU, by more than a few rows at least."""
    if compiles():
        from hf_polyspec.cpu.compiled.product import CompiledProduct

        return CompiledProduct(weight, bias)
    return PackedFloat(weight, bias) if multiplies(weight.dtype) else WidenedFloat(weight, bias)


def packed_size(matrix: Tensor) -> int:
    """Bytes of memory that `pack_float` keeps."""
    return packed_bytes(matrix.shape, matrix.dtype)


def packed_bytes(shape: torch.Size, dtype: torch.dtype) -> int:
    """`packed_size` of a matrix of a shape `[N, K]`."""
    if not compiles():
        return shape.numel() * (dtype.itemsize if multiplies(dtype) else 4)
    from hf_polyspec.cpu.compiled.panels import filled_up

    return filled_up(shape, dtype).numel() * dtype.itemsize


def packing_size(matrix: Tensor, joined: bool) -> int:
    """Bytes of memory that `pack_float` needs while it packs; `joined`: with those of putting matrices together."""
    return packed_size(matrix) * 2 + (matrix.nbytes if joined else 0)


def room_for(matrix: Tensor, size: int | None = None) -> bool:
    """Whether half of the device's memory stays free after keeping `size` bytes beside `matrix` (None: its own)."""
    if size is None:
        size = matrix.numel() * matrix.element_size()
    if matrix.is_cuda:
        free, total = torch.cuda.mem_get_info(matrix.device)
        return bool(free - size > total / 2)
    return half_stays_free(size)
