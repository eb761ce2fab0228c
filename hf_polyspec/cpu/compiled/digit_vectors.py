# SPDX-License-Identifier: Apache-2.0
"""Activations into digits, and sums of digits into activations, a register at a time."""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from .dots import BLOCK
from .vectors import FLOATS, LANES, WORDS, load, narrowed, place, spread, words

_BYTES = ir.VectorType(ir.IntType(8), LANES)


@intrinsic
def largest_bits(_typing: Any, x: Any, count: Any, like: Any) -> Any:
    """The largest of the magnitudes of numbers as the bits of a float32: of bits so read the order is the same.

    The address of the numbers; how many, a multiple of `LANES`; a number like them.
    """

    def generate(context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        x, count, _ = arguments
        size = context.get_constant(types.int64, like.bitwidth // 8)
        zero, lanes = (context.get_constant(types.int64, number) for number in (0, LANES))
        top = cgutils.alloca_once_value(builder, words(0))

        def larger(one: Any, other: Any) -> Any:
            return builder.select(builder.icmp_signed(">", one, other), one, other)

        with cgutils.for_range_slice(builder, zero, count, lanes, intp=ir.IntType(64)) as (index, _):
            found = builder.bitcast(load(builder, like, builder.add(x, builder.mul(index, size))), WORDS)
            found = builder.and_(found, words(0x7FFFFFFF))
            builder.store(larger(found, builder.load(top)), top)
        best, part = builder.load(top), LANES
        while part > 1:
            part //= 2
            order = ir.Constant(WORDS, [(lane + part) % LANES for lane in range(LANES)])
            best = larger(best, builder.shuffle_vector(best, ir.Constant(WORDS, ir.Undefined), order))
        return builder.extract_element(best, ir.Constant(ir.IntType(32), 0))

    return types.int32(types.int64, types.int64, like), generate


def _writer(each: int) -> Any:
    @intrinsic
    def write(_typing: Any, x: Any, digits: Any, sums: Any, pitch: Any, count: Any, steps: Any, like: Any) -> Any:
        """Numbers of one row times `steps`, rounded, as `each` digits to the base 256.

        Addresses of the numbers, of the first digit and of int32 `[each]` for the sums of each digit; bytes between
        digits of one number; how many numbers, a multiple of `LANES`; a number like those of x.
        """

        def generate(context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
            x, digits, sums, pitch, count, steps, _ = arguments
            rint = cgutils.get_or_insert_function(
                builder.module, ir.FunctionType(FLOATS, [FLOATS]), f"llvm.rint.v{LANES}f32"
            )

            def number(value: int) -> Any:
                return context.get_constant(types.int64, value)

            factor = spread(builder, steps, FLOATS)
            totals = [cgutils.alloca_once_value(builder, words(0)) for _ in range(each)]
            with cgutils.for_range_slice(builder, number(0), count, number(LANES), intp=ir.IntType(64)) as (index, _):
                address = builder.add(x, builder.mul(index, number(like.bitwidth // 8)))
                scaled = builder.call(rint, [builder.fmul(load(builder, like, address), factor)])
                low = builder.fptosi(scaled, WORDS)
                found = [low]
                if each == 2:
                    high = builder.ashr(builder.add(low, words(128)), words(8))
                    found = [high, builder.sub(low, builder.shl(high, words(8)))]
                for digit, (total, values) in enumerate(zip(totals, found, strict=True)):
                    builder.store(builder.add(builder.load(total), values), total)
                    begin = builder.add(builder.add(digits, builder.mul(number(digit), pitch)), index)
                    builder.store(builder.trunc(values, _BYTES), place(builder, begin, _BYTES), align=1)
            kind = ir.FunctionType(ir.IntType(32), [WORDS])
            add = cgutils.get_or_insert_function(builder.module, kind, f"llvm.vector.reduce.add.v{LANES}i32")
            for digit, total in enumerate(totals):
                begin = place(builder, builder.add(sums, number(digit * 4)), ir.IntType(32))
                builder.store(builder.call(add, [builder.load(total)]), begin, align=4)
            return context.get_dummy_value()

        return types.void(*(types.int64,) * 5, types.float32, like), generate

    return write


write_one, write_two = _writer(1), _writer(2)


def _finisher(each: int) -> Any:
    @intrinsic
    def finish(
        _typing: Any, sums: Any, shifts: Any, vectors: Any, pitch: Any, scales: Any, y: Any, apart: Any, rows: Any,
        like: Any,
    ) -> Any:  # fmt: skip
        """`y = (the digits' sums - zeros * the row's) * scale * scales + bias` for so many rows of one block.

        Addresses of the sums (int32 `[rows, each, BLOCK]`) and of the rows' sums (int32 `[rows, each]`); of the
        block's zeros (int32), scales and biases (float32), `pitch` bytes from one to the next; of the rows' scales
        (float32); of the first row of y, `apart` bytes from one to the next; a number like those of y.
        """

        def generate(context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
            sums, shifts, vectors, pitch, row_scales, y, apart, rows, _ = arguments

            def number(value: int) -> Any:
                return context.get_constant(types.int64, value)

            def register(base: Any, offset: int, kind: Any) -> Any:
                return builder.load(place(builder, builder.add(base, number(offset)), kind), align=4)

            def of_block(base: Any, kind: Any) -> list[Any]:
                return [register(base, half * LANES * 4, kind) for half in range(2)]

            scales = builder.add(vectors, pitch)
            zeros, factors = of_block(vectors, WORDS), of_block(scales, FLOATS)
            biases, base = of_block(builder.add(scales, pitch), FLOATS), ir.Constant(FLOATS, [256.0] * LANES)
            with cgutils.for_range_slice(builder, number(0), rows, number(1), intp=ir.IntType(64)) as (row, _):
                own_sums = builder.add(sums, builder.mul(row, number(each * BLOCK * 4)))
                own_shifts = builder.add(shifts, builder.mul(row, number(each * 4)))
                shift = [
                    spread(builder, register(own_shifts, 4 * digit, ir.IntType(32)), WORDS) for digit in range(each)
                ]
                scale = register(builder.add(row_scales, builder.mul(row, number(4))), 0, ir.FloatType())
                begin = builder.add(y, builder.mul(row, apart))
                for half in range(2):
                    whole = [
                        builder.sub(
                            register(own_sums, (digit * BLOCK + half * LANES) * 4, WORDS),
                            builder.mul(zeros[half], shift[digit]),
                        )
                        for digit in range(each)
                    ]
                    total = builder.sitofp(whole[0], FLOATS)
                    if each == 2:
                        total = builder.fadd(builder.fmul(total, base), builder.sitofp(whole[1], FLOATS))
                    factor = builder.fmul(factors[half], spread(builder, scale, FLOATS))
                    out = narrowed(builder, builder.fadd(builder.fmul(total, factor), biases[half]), like)
                    address = builder.add(begin, number(half * LANES * (like.bitwidth // 8)))
                    builder.store(out, place(builder, address, out.type), align=like.bitwidth // 8)
            return context.get_dummy_value()

        return types.void(*(types.int64,) * 8, like), generate

    return finish


finish_one, finish_two = _finisher(1), _finisher(2)
