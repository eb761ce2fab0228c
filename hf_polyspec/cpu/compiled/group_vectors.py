# SPDX-License-Identifier: Apache-2.0
"""Dot products of 4-bit codes in groups with digits, a register at a time (VNNI, see `dots`).

A byte holds the codes of one output for two inputs, eight inputs apart: a word's four low halves go with four inputs,
its four high halves with the next four. Both are split off in a register and multiplied as bytes are.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from .dots import BLOCK, DOT
from .vectors import FLOATS, LANES, WORDS, load, narrowed, place, spread, words

PAIR = 8
"""Inputs whose codes lie in one word of an output."""
ROWS = 4
"""Rows, of two digits each, that are multiplied at once."""

_WORD = ir.IntType(32)
_BYTES = ir.VectorType(ir.IntType(8), LANES)


_NONE = ir.Constant(FLOATS, [0.0] * LANES)


def _number(value: int) -> Any:
    return ir.Constant(ir.IntType(64), value)


def _at(builder: Any, base: Any, index: Any, size: int) -> Any:
    return builder.add(base, builder.mul(index, _number(size)))


def _loop(builder: Any, count: Any) -> Any:
    return cgutils.for_range_slice(builder, _number(0), count, _number(1), intp=ir.IntType(64))


def _add_words(builder: Any, codes: Any, begins: list[Any], step: Any, sums: list[list[Any]]) -> None:
    """Add the products of one word of a block's codes, two codes a byte, with each row's digits to the exact sums."""
    dot = cgutils.get_or_insert_function(builder.module, ir.FunctionType(WORDS, [WORDS] * 3), DOT)
    base = _at(builder, codes, step, BLOCK * 4)
    places = [place(builder, builder.add(base, _number(half * LANES * 4)), WORDS) for half in range(2)]
    both = [builder.load(one, align=4) for one in places]
    low = [builder.and_(half, words(0x0F0F0F0F)) for half in both]
    high = [builder.and_(builder.lshr(half, words(4)), words(0x0F0F0F0F)) for half in both]
    for begin, row in zip(begins, sums, strict=True):
        for part, factors in enumerate((low, high)):
            address = builder.add(_at(builder, begin, step, PAIR), _number(4 * part))
            four = spread(builder, builder.load(place(builder, address, _WORD), align=1), WORDS)
            for one, factor in zip(row, factors, strict=True):
                builder.store(builder.call(dot, [builder.load(one), factor, four]), one)


def _add_group(
    builder: Any,
    group: Any,
    scales: Any,
    zeros: Any,
    shifts: list[Any],
    sums: list[list[Any]],
    totals: list[list[Any]],
) -> None:
    """Add a group's exact sums, less the zeros' share, times its scales to the totals; `shifts`: a number a row."""
    for half in range(2):
        lane = builder.add(builder.mul(group, _number(BLOCK)), _number(half * LANES))
        scale = load(builder, types.int16, _at(builder, scales, lane, 2))
        zero = builder.load(place(builder, builder.add(zeros, lane), _BYTES), align=1)
        zero = builder.zext(zero, WORDS)
        for r, (row, shift) in enumerate(zip(totals, shifts, strict=True)):
            found = builder.shl(builder.load(sums[2 * r][half]), words(8))
            found = builder.add(found, builder.load(sums[2 * r + 1][half]))
            found = builder.sub(found, builder.mul(zero, spread(builder, shift, WORDS)))
            # "contract" lets both become one instruction.
            added = builder.fmul(builder.sitofp(found, FLOATS), scale, flags=("contract",))
            builder.store(builder.fadd(builder.load(row[half]), added, flags=("contract",)), row[half])


def _group_dots(rows: int) -> Any:
    @intrinsic
    def dots(
        _typing: Any,
        codes: Any,
        digits: Any,
        pitch: Any,
        shifts: Any,
        scales: Any,
        zeros: Any,
        groups: Any,
        steps: Any,
        y: Any,
    ) -> Any:
        """`y[r, n] = sum over groups g of scale[g, n] * sum over k in g of (code[n, k] - zero[g, n]) * v[r, k]`.

        `v = 256 high + low`; each group's sum is exact, and the groups are added in their order in float32.

        Addresses of one block's codes, of the first row's digits (high, then low) with `pitch` bytes between digits,
        of sums of the digits in each group (int32 `[rows, groups]`, of both together), of the block's scales (float16
        `[groups, BLOCK]`) and zeros (bytes); how many groups, and words of codes in each; the address of float32
        `[rows, BLOCK]`.
        """

        def generate(context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
            codes, digits, pitch, shifts, scales, zeros, groups, steps, y = arguments
            begins = [builder.add(digits, builder.mul(_number(row), pitch)) for row in range(2 * rows)]
            totals = [[cgutils.alloca_once_value(builder, _NONE) for _ in range(2)] for _ in range(rows)]
            sums = [[cgutils.alloca_once_value(builder, words(0)) for _ in range(2)] for _ in begins]
            for total in (total for row in totals for total in row):
                builder.store(_NONE, total)
            with _loop(builder, groups) as (group, _):
                for one in (one for row in sums for one in row):
                    builder.store(words(0), one)
                first = builder.mul(group, steps)
                with _loop(builder, steps) as (inner, _):
                    _add_words(builder, codes, begins, builder.add(first, inner), sums)
                places = [builder.add(builder.mul(_number(r), groups), group) for r in range(rows)]
                shared = [builder.load(place(builder, _at(builder, shifts, at, 4), _WORD), align=4) for at in places]
                _add_group(builder, group, scales, zeros, shared, sums, totals)
            for r, row in enumerate(totals):
                for half, total in enumerate(row):
                    where = builder.add(y, _number((r * BLOCK + half * LANES) * 4))
                    builder.store(builder.load(total), place(builder, where, FLOATS), align=4)
            return context.get_dummy_value()

        return types.void(*(types.int64,) * 9), generate

    return dots


one_group_dots, two_group_dots, four_group_dots = (_group_dots(rows) for rows in (1, 2, ROWS))


@intrinsic
def finish_groups(_typing: Any, sums: Any, scale: Any, bias: Any, y: Any, like: Any) -> Any:
    """`y = sums * scale + bias` for a row of one block.

    Addresses of the sums and biases `[BLOCK]` float32; the row's scale; the address of y and a number like its.
    """

    def generate(context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        sums, scale, bias, y, _ = arguments
        factor = spread(builder, scale, FLOATS)
        for half in range(2):
            offset = context.get_constant(types.int64, half * LANES * 4)
            found, added = (
                builder.load(place(builder, builder.add(base, offset), FLOATS), align=4) for base in (sums, bias)
            )
            out = narrowed(builder, builder.fadd(builder.fmul(found, factor), added), like)
            step = context.get_constant(types.int64, half * LANES * (like.bitwidth // 8))
            builder.store(out, place(builder, builder.add(y, step), out.type), align=like.bitwidth // 8)
        return context.get_dummy_value()

    return types.void(types.int64, types.float32, types.int64, types.int64, like), generate
