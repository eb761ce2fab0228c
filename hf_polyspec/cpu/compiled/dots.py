# SPDX-License-Identifier: Apache-2.0
"""Dot products of bytes (VNNI): a register adds four products to each of its 32-bit sums in one instruction.

Weights lie as the instruction reads them: for a block of `BLOCK` outputs, four inputs of each side by side, then the
next four. So sums need no adding up at the end, and a block is one stretch of memory.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from llvmlite import binding, ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic
from torch import Tensor

from .amx import DEPTH, TILES
from .vectors import LANES, WORDS, place, prefetch, spread, words

BLOCK = 2 * LANES
"""Outputs of a block: two registers of sums."""
INPUTS = 4
"""Inputs that one sum takes at once."""
GRAIN = DEPTH if TILES else INPUTS
"""What inputs of a block are filled up to a multiple of."""

MOST = 12 if LANES == 16 else 6
"""Rows of digits that are multiplied at once; more sums than that do not fit into the registers."""
NEXT = BLOCK * INPUTS
"""Bytes of a step, and of the next block that one pass over a block asks for at each of its steps."""

_WORD = ir.IntType(32)
DOT = f"llvm.x86.avx512.vpdpbusd.{LANES * 32}"
"""The instruction's name."""


@cache
def has_dots() -> bool:
    """Whether this CPU has the instruction for registers of the width that is used here."""
    features = binding.get_host_cpu_features()
    wide, narrow, both = (bool(features.get(name, False)) for name in ("avx512vnni", "avxvnni", "avx512vl"))
    return wide if LANES == 16 else narrow or (wide and both)


def in_blocks(codes: Tensor) -> Tensor:
    """Codes `[N, K]` uint8 as `[N / BLOCK, K / 4, BLOCK, 4]`, filled up with zeros, K to a multiple of `GRAIN`."""
    outputs, width = codes.shape
    padding = (0, -width % GRAIN, 0, -outputs % BLOCK)
    filled = torch.nn.functional.pad(codes, padding)
    blocks = filled.view(-1, BLOCK, filled.shape[1] // INPUTS, INPUTS)
    return blocks.transpose(1, 2).contiguous()


def _dots(rows: int) -> Any:
    @intrinsic
    def dots(_typing: Any, codes: Any, digits: Any, sums: Any, pitch: Any, steps: Any, ahead: Any, pace: Any) -> Any:
        """`sums[r, n] = sum over k of codes[n, k] * digits[r, k]` for one block of unsigned codes, signed digits.

        Addresses of the block, of the first digit and of the first of the sums (int32 `[rows, BLOCK]`); bytes from
        one row of digits to the next; inputs divided by four; where lies what the memory may bring meanwhile, and
        how many bytes of it at each step.
        """

        def generate(context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
            codes, digits, sums, pitch, steps, ahead, pace = arguments
            dot = cgutils.get_or_insert_function(builder.module, ir.FunctionType(WORDS, [WORDS] * 3), DOT)

            def number(value: int) -> Any:
                return context.get_constant(types.int64, value)

            begins = [builder.add(digits, builder.mul(number(row), pitch)) for row in range(rows)]
            totals = [[cgutils.alloca_once_value(builder, words(0)) for _ in range(2)] for _ in begins]
            with cgutils.for_range_slice(builder, number(0), steps, number(1), intp=ir.IntType(64)) as (step, _):
                begin = builder.add(codes, builder.mul(step, number(BLOCK * INPUTS)))
                halves = [builder.add(begin, number(half * LANES * 4)) for half in range(2)]
                factors = [builder.load(place(builder, half, WORDS), align=4) for half in halves]
                line = builder.add(ahead, builder.mul(step, pace))
                prefetch(builder, line, 2)
                prefetch(builder, builder.add(line, builder.lshr(pace, number(1))), 2)
                for base, row in zip(begins, totals, strict=True):
                    address = builder.add(base, builder.mul(step, number(4)))
                    four = spread(builder, builder.load(place(builder, address, _WORD), align=1), WORDS)
                    for total, factor in zip(row, factors, strict=True):
                        builder.store(builder.call(dot, [builder.load(total), factor, four]), total)
            for index, row in enumerate(totals):
                for half, total in enumerate(row):
                    address = builder.add(sums, number((index * BLOCK + half * LANES) * 4))
                    builder.store(builder.load(total), place(builder, address, WORDS), align=4)
            return context.get_dummy_value()

        return types.void(*(types.int64,) * 7), generate

    return dots


one_dots, two_dots, four_dots, six_dots, eight_dots, ten_dots, twelve_dots = (
    _dots(rows) for rows in (1, 2, 4, 6, 8, 10, 12)
)
