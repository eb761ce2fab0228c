# SPDX-License-Identifier: Apache-2.0
"""Dot products of bfloat16 (AVX512-BF16): a register adds two products to each of its float32 sums in one instruction.

Both are added exactly as they are, one after the other, so sums are as good as those of widened numbers. (Numbers below
the smallest normal one count as zero.) Where the CPU has tiles (see `amx`) these multiply pairs too, as many rows as
there are: their sums run in another order, and a row's must not depend on how many others there are.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import binding, ir
from numba import types
from numba.core import cgutils
from numba.extending import overload
from torch import Tensor
from torch.nn.functional import pad

from .amx import DEPTH, TILES
from .numbers import widen
from .vectors import FLOATS, LANES, WORDS

PAIRED = LANES == 16 and bool(binding.get_host_cpu_features().get("avx512bf16", False))
"""Whether this CPU has the instruction."""

GRAIN = DEPTH // 2 if TILES else 2
"""What inputs are filled up to a multiple of where they are multiplied in pairs."""

_NAME = f"llvm.x86.avx512bf16.dpbf16ps.{LANES * 32}"


def in_pairs(panels: Tensor) -> Tensor:
    """Panels `[P, K, WIDTH]` with two inputs of each output side by side, `[P, K / 2, WIDTH, 2]`.

    K is made a multiple of `GRAIN`.
    """
    filled = pad(panels, (0, 0, 0, -panels.shape[1] % GRAIN))
    halves: Tensor = filled.unflatten(1, (-1, 2))
    return halves.transpose(2, 3)


def add_pairs(builder: Any, sums: Any, weights: Any, active: Any) -> Any:
    """`sums + weights[2 n] * active[2 n] + weights[2 n + 1] * active[2 n + 1]` in every lane n, pairs in WORDS."""
    # Its arguments as words: newer compilers see that bfloat16 is meant, older ones know no such type.
    dot = cgutils.get_or_insert_function(builder.module, ir.FunctionType(FLOATS, [FLOATS, WORDS, WORDS]), _NAME)
    return builder.call(dot, [sums, weights, active])


def paired(stored: Any) -> bool:
    """Whether weights of a kind (a type of numba's) are multiplied in pairs."""
    return bool(PAIRED and stored == types.uint16)


def deep(inputs: Any, stored: Any) -> Any:
    """Inputs a row as they are multiplied with weights of a kind: a multiple of `GRAIN` where these are pairs."""
    raise NotImplementedError


@overload(deep, strict=False)
def _deep(inputs: Any, stored: Any) -> Any:
    if paired(stored):
        return lambda inputs, stored: (inputs + GRAIN - 1) // GRAIN * GRAIN
    return lambda inputs, stored: inputs


def operand_kind(stored: Any) -> Any:
    """A number like the activations as they are multiplied with weights of a kind: float32, or bfloat16."""
    raise NotImplementedError


@overload(operand_kind, strict=False)
def _operand_kind(stored: Any) -> Any:
    if paired(stored):
        return lambda stored: np.uint16(0)
    return lambda stored: np.float32(0)


def operand(value: Any, stored: Any) -> Any:
    """An activation as it is multiplied with weights of a kind."""
    raise NotImplementedError


@overload(operand, strict=False)
def _operand(value: Any, stored: Any) -> Any:
    if paired(stored):
        return lambda value, stored: value
    return lambda value, stored: widen(value)
