# SPDX-License-Identifier: Apache-2.0
"""Sums of products in vector registers: several outputs of several rows at once.

A compiler that meets these loops as loops takes half of a wide register and reads every activation once for each
output; written out as vectors of the CPU's width, four outputs of four rows take 8 reads for 16 products.
"""

from __future__ import annotations

from typing import Any

import torch
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

LANES = 16 if torch.backends.cpu.get_cpu_capability() == "AVX512" else 8
"""float32 numbers in a register."""
OUTPUTS = 4 if LANES == 16 else 2
"""Outputs of a tile: with half as many registers, half as many."""
ROWS = 4
"""Rows of a tile."""

_FLOATS = ir.VectorType(ir.FloatType(), LANES)
_WORDS = ir.VectorType(ir.IntType(32), LANES)


def _load(builder: Any, stored: Any, base: Any, index: Any) -> Any:
    """`LANES` numbers of memory as float32."""
    item = {types.float32: ir.FloatType(), types.int8: ir.IntType(8)}.get(stored, ir.IntType(16))
    address = builder.gep(builder.inttoptr(base, item.as_pointer()), [index])
    numbers = builder.load(builder.bitcast(address, ir.VectorType(item, LANES).as_pointer()))
    numbers.align = stored.bitwidth // 8
    if stored == types.float32:
        return numbers
    if stored == types.int8:
        return builder.sitofp(builder.sext(numbers, _WORDS), _FLOATS)
    if stored == types.uint16:
        shift = ir.Constant(_WORDS, [16] * LANES)
        return builder.bitcast(builder.shl(builder.zext(numbers, _WORDS), shift), _FLOATS)
    return builder.fpext(builder.bitcast(numbers, ir.VectorType(ir.HalfType(), LANES)), _FLOATS)


def _prefetch(builder: Any, address: Any) -> None:
    """Ask for a line of memory; addresses that do not exist do no harm."""
    line, word = ir.IntType(8).as_pointer(), ir.IntType(32)
    kind = ir.FunctionType(ir.VoidType(), [line, word, word, word])
    prefetch = builder.module.declare_intrinsic("llvm.prefetch", (line,), kind)
    read, keep, data = ir.Constant(word, 0), ir.Constant(word, 3), ir.Constant(word, 1)
    builder.call(prefetch, [builder.inttoptr(address, line), read, keep, data])


def _total(builder: Any, numbers: Any) -> Any:
    """The sum over a register, by halves."""
    lanes = LANES
    while lanes > 1:
        lanes //= 2
        order = ir.Constant(_WORDS, [(lane + lanes) % LANES for lane in range(LANES)])
        numbers = builder.fadd(numbers, builder.shuffle_vector(numbers, ir.Constant(_FLOATS, ir.Undefined), order))
    return builder.extract_element(numbers, ir.Constant(ir.IntType(32), 0))


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
            zero = ir.Constant(_FLOATS, [0.0] * LANES)
            totals = [[cgutils.alloca_once_value(builder, zero) for _ in inputs] for _ in active]
            start = context.get_constant(types.int64, 0)
            with cgutils.for_range_slice(builder, start, count, step, intp=ir.IntType(64)) as (index, _):
                weights = [_load(builder, stored, base, index) for base in inputs]
                for base in inputs:  # the memory brings the next tile while this one is computed
                    ahead = builder.add(row(base, OUTPUTS, width, size), builder.mul(index, size))
                    _prefetch(builder, ahead)
                for r, base in enumerate(active):
                    numbers = _load(builder, types.float32, base, index)
                    for n, factors in enumerate(weights):
                        # "contract" lets both become one instruction.
                        added = builder.fmul(factors, numbers, flags=("contract",))
                        added = builder.fadd(builder.load(totals[r][n]), added, flags=("contract",))
                        builder.store(added, totals[r][n])
            for r in range(rows):
                place = builder.inttoptr(row(sums, r, sums_pitch, four), ir.FloatType().as_pointer())
                for n in range(OUTPUTS):
                    sum_ = _total(builder, builder.load(totals[r][n]))
                    builder.store(sum_, builder.gep(place, [context.get_constant(types.int64, n)]))
            return context.get_dummy_value()

        words = (types.int64,) * 7
        return types.void(*words, stored), generate

    return tile


one_row = _tile(1)
four_rows = _tile(ROWS)
