# SPDX-License-Identifier: Apache-2.0
"""Products of 8-bit weights on the CPU's dot products of bytes, with activations of one or two digits.

A row of activations is scaled by its own largest magnitude to whole numbers of 16 bits (or 8) and written as digits
to the base 256, `v = 256 high + low`. Sums of products of whole numbers are exact, so a row's result does not depend
on the other rows, and 16 bits are as good as float activations.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import torch
from numba import carray, njit
from torch import Tensor

from .amx import DEPTH, STEP, TILES, done, lines_of, one_of_bytes, reshaped, two_of_bytes
from .digit_vectors import finish_one, finish_two, largest_bits, write_one, write_two
from .dots import (
    BLOCK,
    GRAIN,
    INPUTS,
    MOST,
    NEXT,
    eight_dots,
    four_dots,
    in_blocks,
    one_dots,
    six_dots,
    ten_dots,
    twelve_dots,
    two_dots,
)
from .numbers import LIKE, VERSION, bits, from_bits, widen
from .pages import laid_out
from .panels import LINE
from .product import multiplied
from .shares import ANYBODY, next_part
from .tasks import Launch, behind, borrow, compiled, part_size, pointer, together, whole_lines
from .vectors import LANES

CHUNK = 32
"""Rows whose digits a thread holds at a time."""
FEW = 2
"""Rows of digits up to which registers are used where there are tiles."""
SPARE = 3
"""Rows of digits behind the last one: those of an odd number are multiplied with one more, in tiles with up to three.
"""
WIDEST = 1 << 16
"""Inputs up to which 32-bit sums hold: 255 * 128 * 65536 < 2 ** 31."""


@njit
def largest_magnitude(x: Any, like: Any) -> Any:
    """The largest magnitude of a row, as float32; found among the bits, whose order is the same."""
    done = x.size // LANES * LANES
    top = largest_bits(x.ctypes.data, done, like)
    for k in range(done, x.size):
        top = max(top, np.int32(bits(widen(x[k])) & np.uint32(0x7FFFFFFF)))
    return from_bits(top)


@njit
def _write_digits(x: Any, digits: Any, sums: Any, like: Any) -> Any:
    """One row as whole numbers of one or two digits, and the sum of each digit; the scale that undoes it."""
    largest = largest_magnitude(x, like)
    if not largest < np.float32(np.inf):  # infinite or not a number: no number comes of it, as in torch
        digits[:], sums[:] = 0, 0
        return np.float32(np.nan)
    each, pitch = digits.shape
    reach = np.float32(127 if each == 1 else 127 * 256 + 127)
    largest = max(largest, np.float32(1e-30))
    steps, done = reach / largest, x.size // LANES * LANES
    begin, place, totals = x.ctypes.data, digits.ctypes.data, sums.ctypes.data
    if each == 1:
        write_one(begin, place, totals, pitch, done, steps, like)
    else:
        write_two(begin, place, totals, pitch, done, steps, like)
    for k in range(done, x.size):
        low, high = np.int32(np.rint(widen(x[k]) * steps)), np.int32(0)
        if each == 2:
            high = (low + np.int32(128)) >> np.int32(8)
            low -= high << np.int32(8)
            digits[0, k] = np.int8(high)
            sums[0] += high
        digits[each - 1, k] = np.int8(low)
        sums[each - 1] += low
    return largest / reach


@njit
def _some_dots(rows: Any, codes: Any, digits: Any, sums: Any, pitch: Any, steps: Any, ahead: Any, pace: Any) -> None:
    """The sums of one block for at least so many rows of digits, at most `MOST`."""
    if rows == 1:
        one_dots(codes, digits, sums, pitch, steps, ahead, pace)
    elif rows == 2:
        two_dots(codes, digits, sums, pitch, steps, ahead, pace)
    elif rows <= 4:
        four_dots(codes, digits, sums, pitch, steps, ahead, pace)
    elif rows <= 6:
        six_dots(codes, digits, sums, pitch, steps, ahead, pace)
    elif rows <= 8:
        eight_dots(codes, digits, sums, pitch, steps, ahead, pace)
    elif rows <= 10:
        ten_dots(codes, digits, sums, pitch, steps, ahead, pace)
    else:
        twelve_dots(codes, digits, sums, pitch, steps, ahead, pace)


@njit
def _multiply_tiles(each: Any, count: Any, codes: Any, digits: Any, sums: Any, steps: Any, ahead: Any) -> None:
    """As `_multiply_registers` does, `each` rows to a tile."""
    passes = (count + 2 * each - 1) // (2 * each)
    pace, pitch, apart = STEP // passes // LINE * LINE, digits.strides[0], each * digits.strides[0]
    of_digits, of_sums, steps = digits.ctypes.data, sums.ctypes.data, steps * INPUTS // DEPTH
    for top in range(0, count, 2 * each):
        if count - top > each:
            two_of_bytes(codes, of_digits, of_sums, each, pitch, steps, ahead, pace)
        else:
            one_of_bytes(codes, of_digits, of_sums, each, pitch, steps, ahead, pace)
        of_digits, of_sums, ahead = of_digits + 2 * apart, of_sums + 2 * each * BLOCK * 4, ahead + steps * pace


@njit
def _multiply_registers(count: Any, codes: Any, digits: Any, sums: Any, steps: Any, ahead: Any) -> None:
    """One block's sums for so many rows of digits; meanwhile the memory brings the block at `ahead`.

    One that waits for the memory does not multiply: with many rows a block takes longer to multiply than to bring, so
    what is asked for is spread over all of the time that this one takes.
    """
    groups = (count + MOST - 1) // MOST
    each, pace, pitch = ((count + groups - 1) // groups + 1) // 2 * 2, NEXT // groups, digits.strides[0]
    of_digits, of_sums = digits.ctypes.data, sums.ctypes.data
    for group in range(groups):
        top = group * each
        some, place, found = min(each, count - top), of_digits + top * pitch, of_sums + top * BLOCK * 4
        _some_dots(some, codes, place, found, pitch, steps, ahead + group * steps * pace, pace)


@njit
def _multiply(lines: Any, count: Any, codes: Any, digits: Any, sums: Any, steps: Any, ahead: Any) -> None:
    """One block's sums, in tiles of so many lines or, without any, in registers, which are as quick with few rows."""
    if lines:
        _multiply_tiles(lines, count, codes, digits, sums, steps, ahead)
    else:
        _multiply_registers(count, codes, digits, sums, steps, ahead)


@njit
def multiply_digits_task(task: Any, active: Any, me: Any, threads: Any) -> None:
    """`y = (digits @ codes.T - sum(digits) * zeros) * scales * the row's scale + bias`; `me` as in `next_part`."""
    numbers = carray(pointer(task, np.int64(0)), 10)
    outputs, width, rows, size, each = numbers[1], numbers[2], numbers[3], numbers[4], numbers[5]
    all_codes, all_vectors = numbers[6], numbers[7]
    x = carray(pointer(numbers[8], active), (rows, width))
    y = carray(pointer(numbers[9], active), (rows, outputs))
    steps = (width + GRAIN - 1) // GRAIN * (GRAIN // INPUTS)
    pitch = (outputs + BLOCK - 1) // BLOCK * BLOCK * 4
    most = min(rows, CHUNK)
    lines = most * each + SPARE
    of_digits, of_sums = whole_lines(lines * steps * INPUTS), whole_lines(lines * BLOCK * 4)
    of_rows = whole_lines(most * 4) + whole_lines(most * each * 4)
    memory = borrow(task, of_digits + of_sums + of_rows + whole_lines(most * BLOCK * 4))
    if memory == 0:
        return
    whole, one = np.int32(0), np.float32(0)
    digits = carray(pointer(memory, np.int8(0)), (lines, steps * INPUTS))
    sums = carray(pointer(behind(digits), whole), (lines, BLOCK))
    row_scales = carray(pointer(behind(sums), one), most)
    row_sums = carray(pointer(behind(row_scales), whole), (most, each))
    part_of_block = carray(pointer(behind(row_sums), active), (most, BLOCK))
    digits[:] = 0
    parts = (outputs + size - 1) // size
    me = me if rows <= CHUNK else ANYBODY
    held, in_tiles, part = -1, 0, next_part(task, me, threads, parts)
    while True:
        chunk, first = part // parts, part % parts * size
        start = chunk * CHUNK
        if start >= rows:
            done(memory, in_tiles)
            return
        count = min(rows - start, CHUNK)
        if chunk != held:
            in_tiles = reshaped(lines_of(count * each) if TILES and count * each > FEW else 0, in_tiles)
            for r in range(count):
                own = digits[r * each : (r + 1) * each]
                row_scales[r] = _write_digits(x[start + r], own, row_sums[r], active)
            held = chunk
        end = min(outputs, first + size)
        for begin in range(first, end, BLOCK):
            codes, following = all_codes + begin * steps * INPUTS, begin + BLOCK
            if following >= end:  # the next part is taken now, so that its codes are on their way
                part = next_part(task, me, threads, parts)
                following = part % parts * size if part // parts * CHUNK < rows else begin
            ahead = all_codes + following * steps * INPUTS
            _multiply(in_tiles, count * each, codes, digits, sums, steps, ahead)
            complete, vectors = outputs - begin >= BLOCK, all_vectors + begin * 4
            place = y.ctypes.data + (start * outputs + begin) * y.itemsize if complete else part_of_block.ctypes.data
            apart, found = (outputs if complete else BLOCK) * y.itemsize, sums.ctypes.data
            shifts, scales = row_sums.ctypes.data, row_scales.ctypes.data
            if each == 1:
                finish_one(found, shifts, vectors, pitch, scales, place, apart, count, active)
            else:
                finish_two(found, shifts, vectors, pitch, scales, place, apart, count, active)
            if not complete:
                y[start : start + count, begin:] = part_of_block[:count, : outputs - begin]


def _task(active: Any) -> Callable[[Any], None]:
    version = VERSION

    def task(numbers: Any) -> None:
        if version >= 0:  # always, see there
            multiply_digits_task(numbers, active, ANYBODY, 1)

    return task


@cache
def _function(active: torch.dtype) -> Launch:
    return together(compiled(_task(LIKE[active])))


class DigitProduct:
    """A matrix of unsigned bytes, multiplied with activations of one or two digits.

    Args:
        codes: `[N, K]` uint8 on the CPU, K up to `WIDEST`; kept in an order of its own.
        zeros: `[N]`, what counts as zero among the codes, whole numbers.
        scales: `[N]`, multiplied into the result.
        bias: `[N]` or None.
        digits: 2 for activations as good as float, 1 for activations rounded to 8 bits: faster, coarser.
    """

    dtype = torch.uint8
    """What the matrix is stored as."""

    def __init__(self, codes: Tensor, zeros: Tensor, scales: Tensor, bias: Tensor | None, digits: int = 2) -> None:
        self.shape = (codes.shape[0], codes.shape[1])
        self._codes = laid_out(in_blocks(codes))
        vectors = torch.zeros(3, self._codes.shape[0] * BLOCK)
        vectors[0].view(torch.int32)[: codes.shape[0]] = zeros.to(torch.int32)
        vectors[1, : codes.shape[0]] = scales
        if bias is not None:
            vectors[2, : codes.shape[0]] = bias
        self._vectors, self._digits = vectors, digits

    def task(self, rows: int, x: int, y: int) -> tuple[int, ...]:
        """The numbers of the task that multiplies rows at address `x` into `y`."""
        outputs, width = self.shape
        # Many rows are shared out by rows, so that each becomes digits once.
        size = part_size(outputs, BLOCK) if rows <= CHUNK else -(-outputs // BLOCK) * BLOCK
        return (outputs, width, rows, size, self._digits, self._codes.data_ptr(), self._vectors.data_ptr(), x, y)

    def __call__(self, x: Tensor) -> Tensor:
        return multiplied(self, x, _function)
