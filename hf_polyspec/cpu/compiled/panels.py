# SPDX-License-Identifier: Apache-2.0
"""Sums of products with outputs in the lanes of registers: a weight is widened once and used for up to twelve rows.

Weights lie as they are read: for a panel of `WIDTH` outputs, input after input. So sums need no adding up at the end,
and every row's sum runs over the inputs in their order: its result is the same to the last bit whatever stands beside
it.
"""

from __future__ import annotations

from typing import Any

import torch
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic
from torch import Tensor

from .pairs import GRAIN, PAIRED, add_pairs, in_pairs, paired
from .vectors import FLOATS, LANES, WORDS, load, narrowed, place, prefetch, spread, words

WIDTH = 2 * LANES
"""Outputs of a panel: two registers of sums a row."""
MOST = 12 if LANES == 16 else 6
"""Rows that are multiplied at once; more sums than that do not fit into the registers."""
LINE = 64
"""Bytes that the memory brings at once."""


def filled_up(shape: torch.Size, dtype: torch.dtype) -> torch.Size:
    """The shape of a matrix `[N, K]` with the zeros that `in_panels` adds."""
    outputs, inputs = shape
    grain = GRAIN if dtype is torch.bfloat16 and PAIRED else 1
    return torch.Size((outputs + -outputs % WIDTH, inputs + -inputs % grain))


def in_panels(weight: Tensor) -> Tensor:
    """A matrix `[N, K]` as `[N / WIDTH, K, WIDTH]`, filled up with zeros.

    bfloat16 numbers lie in pairs. Where the CPU multiplies them so these are two inputs of one output. Elsewhere they
    are of one input, the first of one half of the panel beside the first of the other: as words of 32 bits their upper
    and lower halves become float32 in one instruction each.
    """
    outputs, inputs = weight.shape
    filled = torch.nn.functional.pad(weight, (0, 0, 0, -outputs % WIDTH))
    panels = filled.view(-1, WIDTH, inputs).transpose(1, 2)
    if weight.dtype is torch.bfloat16:
        panels = in_pairs(panels) if PAIRED else panels.unflatten(2, (2, LANES)).transpose(2, 3)
    return panels.contiguous().view(panels.shape[0], -1, WIDTH)


def _halves(builder: Any, stored: Any, address: Any) -> list[Any]:
    """The weights of one input as two registers of float32, or those of a pair of inputs as two of pairs."""
    pairs = paired(stored)
    if stored == types.uint16 and not pairs:
        both = builder.load(place(builder, address, WORDS), align=4)
        low, high = builder.shl(both, words(16)), builder.and_(both, words(0xFFFF0000))
        return [builder.bitcast(low, FLOATS), builder.bitcast(high, FLOATS)]
    size = ir.Constant(ir.IntType(64), LANES * (4 if pairs else stored.bitwidth // 8))
    places = address, builder.add(address, size)
    if pairs:
        return [builder.load(place(builder, one, WORDS), align=4) for one in places]
    return [load(builder, stored, one) for one in places]


def _multiplier(rows: int) -> Any:
    @intrinsic
    def multiply(
        _typing: Any, panel: Any, x: Any, sums: Any, inputs: Any, pitch: Any, ahead: Any, pace: Any, stored: Any
    ) -> Any:
        """`sums[r, n] = sum over k of panel[k, n] * x[r, k]`.

        Addresses of the panel, of rows as `pairs.operand` has them and of float32 sums `[rows, WIDTH]`; inputs;
        bytes from one row of x to the next; where lies what the memory may bring meanwhile, and how many bytes of it
        at each step; a number like the weights.
        """

        def generate(context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
            panel, x, sums, inputs, pitch, ahead, pace, _ = arguments

            def number(value: int) -> Any:
                return context.get_constant(types.int64, value)

            pairs, zero = paired(stored), ir.Constant(FLOATS, [0.0] * LANES)
            bytes_of_step = WIDTH * (4 if pairs else stored.bitwidth // 8)
            size = number(bytes_of_step)
            kind, item = (WORDS, ir.IntType(32)) if pairs else (FLOATS, ir.FloatType())
            steps = builder.lshr(builder.add(inputs, number(1)), number(1)) if pairs else inputs
            bases = [builder.add(x, builder.mul(number(row), pitch)) for row in range(rows)]
            totals = [[cgutils.alloca_once_value(builder, zero) for _ in range(2)] for _ in bases]
            with cgutils.for_range_slice(builder, number(0), steps, number(1), intp=ir.IntType(64)) as (index, _):
                factors = _halves(builder, stored, builder.add(panel, builder.mul(index, size)))
                offset = builder.mul(index, number(4))
                line = builder.add(ahead, builder.mul(index, pace))
                prefetch(builder, line, 2)
                if bytes_of_step > LINE:
                    prefetch(builder, builder.add(line, builder.lshr(pace, number(1))), 2)
                for base, row in zip(bases, totals, strict=True):
                    one = builder.load(place(builder, builder.add(base, offset), item), align=4)
                    active = spread(builder, one, kind)
                    for total, factor in zip(row, factors, strict=True):
                        if pairs:
                            builder.store(add_pairs(builder, builder.load(total), factor, active), total)
                            continue
                        # "contract" lets both become one instruction.
                        added = builder.fmul(factor, active, flags=("contract",))
                        builder.store(builder.fadd(builder.load(total), added, flags=("contract",)), total)
            for index, total in enumerate(total for row in totals for total in row):
                address = builder.add(sums, number(index * LANES * 4))
                builder.store(builder.load(total), place(builder, address, FLOATS), align=4)
            return context.get_dummy_value()

        return types.void(*(types.int64,) * 7, stored), generate

    return multiply


one_row, two_rows, four_rows, six_rows, eight_rows, ten_rows, twelve_rows = (
    _multiplier(rows) for rows in (1, 2, 4, 6, 8, 10, 12)
)


@intrinsic
def finish(
    _typing: Any, sums: Any, vectors: Any, pitch: Any, totals: Any, y: Any, apart: Any, rows: Any, like: Any
) -> Any:
    """`y = (sums - total * zeros) * scales + bias` for so many rows of one panel.

    Addresses of the sums `[rows, WIDTH]` and of the panel's zeros, scales and biases, all float32, `pitch` bytes from
    one to the next; of the sums of the rows' inputs; of the first row of y, `apart` bytes from one to the next; a
    number like those of y.
    """

    def generate(context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        sums, vectors, pitch, totals, y, apart, rows, _ = arguments

        def number(value: int) -> Any:
            return context.get_constant(types.int64, value)

        def register(base: Any, offset: int, kind: Any) -> Any:
            return builder.load(place(builder, builder.add(base, number(offset)), kind), align=4)

        bases = vectors, builder.add(vectors, pitch), builder.add(vectors, builder.add(pitch, pitch))
        zeros, scales, biases = ([register(base, half * LANES * 4, FLOATS) for half in range(2)] for base in bases)
        with cgutils.for_range_slice(builder, number(0), rows, number(1), intp=ir.IntType(64)) as (row, _):
            total = register(builder.add(totals, builder.mul(row, number(4))), 0, ir.FloatType())
            total = spread(builder, total, FLOATS)
            own, begin = builder.add(sums, builder.mul(row, number(WIDTH * 4))), builder.add(y, builder.mul(row, apart))
            for half in range(2):
                found = register(own, half * LANES * 4, FLOATS)
                found = builder.fsub(found, builder.fmul(total, zeros[half]))
                found = builder.fadd(builder.fmul(found, scales[half]), biases[half])
                out = narrowed(builder, found, like)
                step = number(half * LANES * (like.bitwidth // 8))
                builder.store(out, place(builder, builder.add(begin, step), out.type), align=like.bitwidth // 8)
        return context.get_dummy_value()

    return types.void(*(types.int64,) * 7, like), generate
