# SPDX-License-Identifier: Apache-2.0
"""Attention over bfloat16 in whole tiles (see `amx`): scores of some queries, and means of values under their weights.

A block of 32 keys, its words turned so that those of one place of all keys stand side by side, is to queries what a
panel of weights is to activations; so are the values of 32 places of a head, two after two, to weights. Weights are
float32 and are multiplied as two bfloat16 each, what one rounds off being the other, so that means are as good as those
of float32. Every sum runs over the columns in their order, and columns that a position does not see add zeros.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import carray, njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from .amx import DEPTH, LINES, ROWS, STEP, lines_of, one_of_pairs, two_of_pairs
from .tasks import behind, pointer, whole_lines
from .vectors import FLOATS, LANES, WORDS, load, narrowed, place, prefetch, spread, words

COLUMNS = 2 * LINES
"""Keys of a block, and numbers of a head whose values are one panel."""
AT_ONCE = 256
"""Values that are laced before they are multiplied: they must not leave the nearest caches in between. The means of
each so many are added in their order."""
AHEAD = 64
"""Keys or values from those that are brought into order to those that the memory is asked for meanwhile."""
_NUMBER = ir.IntType(64)


@njit
def filled(count: Any, grain: Any) -> Any:
    return (count + grain - 1) // grain * grain


@njit
def room_in_tiles(rows: Any, size: Any) -> Any:
    """Bytes of memory that at most so many rows need, over any number of columns."""
    rows = rows + LINES
    active, panels, split = rows * size * 2, AT_ONCE * size * 2, 2 * rows * AT_ONCE * 2
    return whole_lines(active) + whole_lines(panels) + whole_lines(split) + ROWS * COLUMNS * 4


def _at(builder: Any, base: Any, *offsets: Any) -> Any:
    for offset in offsets:
        base = builder.add(base, offset if isinstance(offset, ir.Value) else ir.Constant(_NUMBER, offset))
    return base


def _times(builder: Any, count: Any, value: int) -> Any:
    return builder.mul(count, ir.Constant(_NUMBER, value))


@intrinsic
def _turn(_typing: Any, rows: Any, pitch: Any, last: Any, lines: Any, apart: Any) -> Any:
    """Sixteen rows of sixteen words as sixteen lines of them, the words of one place side by side.

    Address of the first row, bytes from one to the next, and the address that no row begins behind; address of the
    first line and bytes from one to the next.
    """

    def generate(context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        rows, pitch, last, lines, apart = arguments
        held = []
        for row in range(LINES):
            begin = builder.add(rows, _times(builder, pitch, row))
            begin = builder.select(builder.icmp_unsigned("<", begin, last), begin, last)
            prefetch(builder, _at(builder, begin, _times(builder, pitch, AHEAD)))
            held.append(builder.load(place(builder, begin, WORDS), align=2))
        half = LINES // 2
        halves = [
            ir.Constant(WORDS, [side * half + lane // 2 + LINES * (lane % 2) for lane in range(LINES)])
            for side in range(2)
        ]
        for _ in range(4):  # each time the words of row r and of row r + 8 come to stand in turns
            held = [
                builder.shuffle_vector(held[row], held[row + half], order) for row in range(half) for order in halves
            ]
        for line, found in enumerate(held):
            address = builder.add(lines, _times(builder, apart, line))
            builder.store(found, place(builder, address, WORDS), align=4)
        return context.get_dummy_value()

    return types.void(*(types.int64,) * 5), generate


@intrinsic
def _lace(_typing: Any, first: Any, second: Any, line: Any) -> Any:
    """Thirty-two bfloat16 numbers each of two rows, two of one place side by side."""

    def generate(context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        first, second, line = arguments
        kind = ir.VectorType(ir.IntType(16), LANES)
        far = _times(builder, builder.sub(second, first), AHEAD)
        for base in (first, second):
            prefetch(builder, builder.add(base, far))
        for half in range(2):
            one, other = (
                builder.zext(builder.load(place(builder, _at(builder, base, half * 2 * LANES), kind), align=2), WORDS)
                for base in (first, second)
            )
            both = builder.or_(one, builder.shl(other, words(16)))
            builder.store(both, place(builder, _at(builder, line, half * DEPTH), WORDS), align=4)
        return context.get_dummy_value()

    return types.void(*(types.int64,) * 3), generate


@intrinsic
def _split(_typing: Any, weights: Any, count: Any, high: Any, low: Any, like: Any) -> Any:
    """float32 numbers as two bfloat16 each, what the first rounds off being the second; so many, a multiple of `LANES`.

    Addresses of the numbers, of the first of each and of the second; a number like those.
    """

    def generate(context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        weights, count, high, low, _ = arguments
        start, step = ir.Constant(_NUMBER, 0), ir.Constant(_NUMBER, LANES)
        with cgutils.for_range_slice(builder, start, count, step, intp=_NUMBER) as (index, _):
            found = load(builder, types.float32, _at(builder, weights, _times(builder, index, 4)))
            for base in (high, low):
                part = narrowed(builder, found, like)
                address = _at(builder, base, _times(builder, index, 2))
                builder.store(part, place(builder, address, part.type), align=2)
                wide = builder.bitcast(builder.shl(builder.zext(part, WORDS), words(16)), FLOATS)
                found = builder.fsub(found, wide)
        return context.get_dummy_value()

    return types.void(*(types.int64,) * 4, like), generate


@intrinsic
def _scaled(_typing: Any, sums: Any, scores: Any, pitch: Any, rows: Any, columns: Any, scale: Any) -> Any:
    """Sums `[rows, COLUMNS]`, float32, times a number: the first so many columns, a multiple of `LANES`, into rows that
    lie `pitch` bytes apart."""

    def generate(context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        sums, scores, pitch, rows, columns, scale = arguments
        factor, zero = spread(builder, scale, FLOATS), ir.Constant(_NUMBER, 0)
        one, step = ir.Constant(_NUMBER, 1), ir.Constant(_NUMBER, LANES)
        with cgutils.for_range_slice(builder, zero, rows, one, intp=_NUMBER) as (row, _):
            own, out = (
                _at(builder, sums, _times(builder, row, COLUMNS * 4)),
                _at(builder, scores, builder.mul(row, pitch)),
            )
            with cgutils.for_range_slice(builder, zero, columns, step, intp=_NUMBER) as (index, _):
                offset = _times(builder, index, 4)
                found = builder.load(place(builder, _at(builder, own, offset), FLOATS), align=4)
                builder.store(builder.fmul(found, factor), place(builder, _at(builder, out, offset), FLOATS), align=4)
        return context.get_dummy_value()

    return types.void(*(types.int64,) * 5, types.float32), generate


@njit
def _multiply(panel: Any, x: Any, sums: Any, lines: Any, groups: Any, pitch: Any, steps: Any) -> None:
    """One or two groups of rows by a panel that is in the nearest caches."""
    if groups == 1:
        one_of_pairs(panel, x, sums, lines, pitch, steps, panel, 0)
    else:
        two_of_pairs(panel, x, sums, lines, pitch, steps, panel, 0)


@njit
def scores_in_tiles(active: Any, rows: Any, keys: Any, scores: Any, scale: Any, memory: Any) -> None:
    """`scores[r, s] = scale * (active[r] . keys[s])` for so many rows; tiles are shaped for them.

    Args:
        active: `[R', D]` bfloat16, R' a multiple of `lines_of(rows)`; keys: `[S, D]`.
        scores: `[R, S']`, S' a multiple of `LANES`; what is written behind the first S columns may be anything.
        memory: address of room for a block of keys, and behind it for sums.
    """
    (seen, size), lines = keys.shape, lines_of(rows)
    steps, of_keys, pitch = size * 2 // DEPTH, keys.ctypes.data, size * 2
    sums, last = memory + steps * STEP, of_keys + (seen - 1) * pitch
    of_active, of_scores, apart = active.ctypes.data, scores.ctypes.data, scores.shape[1] * 4
    for s in range(0, seen, COLUMNS):
        for half in range(2):
            first = of_keys + (s + half * LINES) * pitch
            for step in range(steps):
                _turn(first + step * DEPTH, pitch, last + step * DEPTH, memory + step * STEP + half * DEPTH, 2 * DEPTH)
        columns = min(COLUMNS, scores.shape[1] - s)
        for top in range(0, rows, 2 * lines):
            left = rows - top
            _multiply(memory, of_active + top * pitch, sums, lines, 1 if left <= lines else 2, pitch, steps)
            _scaled(sums, of_scores + top * apart + s * 4, apart, min(left, 2 * lines), columns, scale)


@njit
def _lace_all(values: Any, first: Any, panel: Any, columns: Any, like: Any) -> None:
    """A panel of `COLUMNS` numbers of a head, from the `first` on, of values `[S, D]`, filled up with zeros."""
    (count, size), of_values = values.shape, values.ctypes.data + first * 2
    for s in range(0, count - 1, 2):
        _lace(of_values + s * size * 2, of_values + (s + 1) * size * 2, panel + s * DEPTH)
    done = count // 2 * 2
    rest = carray(pointer(panel + done * DEPTH, like), (columns - done) * COLUMNS)
    rest[:] = 0
    if count % 2:
        for k in range(COLUMNS):
            rest[2 * k] = values[count - 1, first + k]


@njit
def means_in_tiles(weights: Any, rows: Any, values: Any, means: Any, memory: Any, like: Any) -> None:
    """The sum of the values `[S, D]` under each of so many rows of weights `[R, S']`; tiles are shaped for them.

    Args:
        weights: 0 behind the first S columns, to the next multiple of `LANES`; means: `[R, D]`.
        memory: address of room for `AT_ONCE` values, behind it for weights, and behind those for sums.
    """
    (seen, size), lines = values.shape, lines_of(rows)
    of_panel, zero = AT_ONCE * COLUMNS * 2, np.float32(0)
    split = carray(pointer(memory + of_panel * (size // COLUMNS), like), (2 * filled(rows, lines), AT_ONCE))
    sums = carray(pointer(behind(split), zero), (ROWS, COLUMNS))
    means[:rows] = zero
    for begin in range(0, seen, AT_ONCE):
        count = min(AT_ONCE, seen - begin)
        columns, given = filled(count, COLUMNS), filled(count, LANES)
        for r in range(rows):
            high = r // lines * 2 * lines + r % lines
            low = high + lines
            _split(weights[r, begin:].ctypes.data, given, split[high].ctypes.data, split[low].ctypes.data, like)
            split[high, given:columns] = 0
            split[low, given:columns] = 0
        for d in range(0, size, COLUMNS):
            panel = memory + d // COLUMNS * of_panel
            _lace_all(values[begin : begin + count], d, panel, columns, like)
            for top in range(0, rows, lines):
                x = split[2 * top].ctypes.data
                _multiply(panel, x, sums.ctypes.data, lines, 2, AT_ONCE * 2, columns * 2 // DEPTH)
                for r in range(min(lines, rows - top)):
                    for k in range(COLUMNS):
                        means[top + r, d + k] += sums[r, k] + sums[lines + r, k]
