# SPDX-License-Identifier: Apache-2.0
"""Sums of products in vector registers: several outputs of several rows at once.

A compiler that meets these loops as loops takes half of a wide register and reads every activation once for each
output; written out as vectors of the CPU's width, four outputs of four rows take 8 reads for 16 products.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from .vectors import FLOATS, LANES, load, place, prefetch, spread, store_some, totals

OUTPUTS = 4 if LANES == 16 else 2
"""Outputs of a tile: with half as many registers, half as many."""
ROWS = 4
"""Rows of a tile."""
AHEAD = 32
"""Keys or values from those that are computed with to those that the memory is asked for meanwhile."""


def _tile(rows: int) -> Any:
    @intrinsic
    def tile(
        _typing: Any, weight: Any, x: Any, sums: Any, width: Any, pitch: Any, sums_pitch: Any, count: Any, stored: Any
    ) -> Any:
        """`sums[r, n] = sum over k < count of weight[n, k] * x[r, k]` for one tile.

        Addresses of the tile's first weight, activation and sum; numbers in a row of weight and of sums; inputs to
        add, a multiple of `LANES`; a number like the weights.
        """

        def generate(context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
            weight, x, sums, width, pitch, sums_pitch, count, _ = arguments
            size = context.get_constant(types.int64, stored.bitwidth // 8)
            four = context.get_constant(types.int64, 4)
            step = context.get_constant(types.int64, LANES)

            def row(base: Any, index: int, of: Any, bytes_each: Any) -> Any:
                offset = builder.mul(builder.mul(context.get_constant(types.int64, index), of), bytes_each)
                return builder.add(base, offset)

            inputs = [row(weight, n, width, size) for n in range(OUTPUTS)]
            active = [row(x, r, pitch, four) for r in range(rows)]
            zero = ir.Constant(FLOATS, [0.0] * LANES)
            sums_of = [[cgutils.alloca_once_value(builder, zero) for _ in inputs] for _ in active]
            start = context.get_constant(types.int64, 0)
            with cgutils.for_range_slice(builder, start, count, step, intp=ir.IntType(64)) as (index, _):
                weights = [load(builder, stored, builder.add(base, builder.mul(index, size))) for base in inputs]
                for base in inputs:  # the memory brings a later tile while this one is computed
                    ahead = builder.add(row(base, AHEAD, width, size), builder.mul(index, size))
                    prefetch(builder, ahead)
                for r, base in enumerate(active):
                    numbers = load(builder, types.float32, builder.add(base, builder.mul(index, four)))
                    for n, factors in enumerate(weights):
                        # "contract" lets both become one instruction.
                        added = builder.fmul(factors, numbers, flags=("contract",))
                        added = builder.fadd(builder.load(sums_of[r][n]), added, flags=("contract",))
                        builder.store(added, sums_of[r][n])
            all_, apart = totals(builder, [builder.load(total) for of_row in sums_of for total in of_row])
            for r in range(rows):
                lanes = [(r * OUTPUTS + n) * apart for n in range(OUTPUTS)]
                store_some(builder, all_, lanes, row(sums, r, sums_pitch, four))
            return context.get_dummy_value()

        words = (types.int64,) * 7
        return types.void(*words, stored), generate

    return tile


four_rows = _tile(ROWS)


def _means(registers: int) -> Any:
    @intrinsic
    def means(
        _typing: Any, values: Any, weights: Any, sums: Any, width: Any, pitch: Any, count: Any, stored: Any
    ) -> Any:
        """`sums[r, d] = sum over s < count of weights[r, s] * values[s, d]` for `ROWS` rows, `registers * LANES` d.

        Addresses of the first value, weight and sum; numbers from one row of values (and of sums) to the next, and of
        weights; a number like the values.
        """

        def generate(context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
            values, weights, sums, width, pitch, count, _ = arguments

            def number(value: int) -> Any:
                return context.get_constant(types.int64, value)

            size, four = number(stored.bitwidth // 8), number(4)
            rows = [builder.add(weights, builder.mul(builder.mul(number(r), pitch), four)) for r in range(ROWS)]
            zero = ir.Constant(FLOATS, [0.0] * LANES)
            found = [[cgutils.alloca_once_value(builder, zero) for _ in range(registers)] for _ in rows]
            with cgutils.for_range_slice(builder, number(0), count, number(1), intp=ir.IntType(64)) as (index, _):
                begin = builder.add(values, builder.mul(builder.mul(index, width), size))
                steps = [builder.mul(number(part * LANES), size) for part in range(registers)]
                parts = [load(builder, stored, builder.add(begin, step)) for step in steps]
                ahead = builder.add(begin, builder.mul(builder.mul(number(AHEAD), width), size))
                for step in steps:
                    prefetch(builder, builder.add(ahead, step))
                for base, of_row in zip(rows, found, strict=True):
                    address = builder.add(base, builder.mul(index, four))
                    weight = builder.load(place(builder, address, ir.FloatType()), align=4)
                    weight = spread(builder, weight, FLOATS)
                    for total, part in zip(of_row, parts, strict=True):
                        added = builder.fmul(weight, part, flags=("contract",))
                        builder.store(builder.fadd(builder.load(total), added, flags=("contract",)), total)
            for r, of_row in enumerate(found):
                for part, total in enumerate(of_row):
                    offset = builder.add(builder.mul(number(r), width), number(part * LANES))
                    address = builder.add(sums, builder.mul(offset, four))
                    builder.store(builder.load(total), place(builder, address, FLOATS), align=4)
            return context.get_dummy_value()

        return types.void(*(types.int64,) * 6, stored), generate

    return means


one_mean, four_means = _means(1), _means(4)
