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

from .digit_vectors import finish_one, finish_two, write_one, write_two
from .dots import BLOCK, INPUTS, eight_dots, four_dots, in_blocks, one_dots, two_dots
from .numbers import LIKE, VERSION, bits, from_bits, widen
from .product import multiplied
from .tasks import Launch, behind, borrow, compiled, part_size, pointer, release, take, together, whole_lines
from .vectors import LANES

CHUNK = 32
"""Rows whose digits a thread holds at a time."""
WIDEST = 1 << 16
"""Inputs up to which 32-bit sums hold: 255 * 128 * 65536 < 2 ** 31."""


@njit
def largest_magnitude(x: Any) -> Any:
    """The largest magnitude of a row, as float32; found among the bits, whose order is the same."""
    top = np.int32(0)
    for k in range(x.size):
        top = max(top, np.int32(bits(widen(x[k])) & np.uint32(0x7FFFFFFF)))
    return from_bits(top)


@njit
def _write_digits(x: Any, digits: Any, sums: Any, lanes: Any, like: Any) -> Any:
    """One row as whole numbers of one or two digits, and the sum of each digit; the scale that undoes it."""
    largest = largest_magnitude(x)
    if not largest < np.float32(np.inf):  # infinite or not a number: no number comes of it, as in torch
        digits[:], sums[:] = 0, 0
        return np.float32(np.nan)
    each, pitch = digits.shape
    reach = np.float32(127 if each == 1 else 127 * 256 + 127)
    largest = max(largest, np.float32(1e-30))
    steps, done = reach / largest, x.size // LANES * LANES
    begin, place, parts = x.ctypes.data, digits.ctypes.data, lanes.ctypes.data
    if each == 1:
        write_one(begin, place, parts, pitch, done, steps, like)
    else:
        write_two(begin, place, parts, pitch, done, steps, like)
    for digit in range(each):
        sums[digit] = lanes[digit].sum()
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
def _multiply(codes: Any, digits: Any, sums: Any, steps: Any) -> None:
    """One block's sums for all rows of digits."""
    count, pitch = digits.shape
    done = 0
    while done + 8 <= count:
        eight_dots(codes, digits[done:].ctypes.data, sums[done:].ctypes.data, pitch, steps)
        done += 8
    if done + 4 <= count:
        four_dots(codes, digits[done:].ctypes.data, sums[done:].ctypes.data, pitch, steps)
        done += 4
    if done + 2 <= count:
        two_dots(codes, digits[done:].ctypes.data, sums[done:].ctypes.data, pitch, steps)
        done += 2
    if done < count:
        one_dots(codes, digits[done:].ctypes.data, sums[done:].ctypes.data, pitch, steps)


@njit
def multiply_digits_task(task: Any, active: Any) -> None:
    """`y = (digits @ codes.T - sum(digits) * zeros) * scales * the row's scale + bias`."""
    numbers = carray(pointer(task, np.int64(0)), 10)
    outputs, width, rows, size, each = numbers[1], numbers[2], numbers[3], numbers[4], numbers[5]
    all_codes, all_vectors = numbers[6], numbers[7]
    x = carray(pointer(numbers[8], active), (rows, width))
    y = carray(pointer(numbers[9], active), (rows, outputs))
    steps = (width + INPUTS - 1) // INPUTS
    pitch = (outputs + BLOCK - 1) // BLOCK * BLOCK * 4
    most = min(rows, CHUNK)
    of_digits, of_sums = whole_lines(most * each * steps * INPUTS), whole_lines(most * each * BLOCK * 4)
    of_rows = whole_lines(most * 4) + whole_lines(most * each * 4)
    memory = borrow(task, of_digits + of_sums + of_rows + whole_lines(each * LANES * 4) + BLOCK * 4)
    if memory == 0:
        return
    whole, one = np.int32(0), np.float32(0)
    digits = carray(pointer(memory, np.int8(0)), (most * each, steps * INPUTS))
    sums = carray(pointer(behind(digits), whole), (most * each, BLOCK))
    row_scales = carray(pointer(behind(sums), one), most)
    row_sums = carray(pointer(behind(row_scales), whole), (most, each))
    lanes = carray(pointer(behind(row_sums), whole), (each, LANES))
    part_of_block = carray(pointer(behind(lanes), active), BLOCK)
    digits[:] = 0
    parts = (outputs + size - 1) // size
    held = -1
    while True:
        part = take(task)
        chunk, first = part // parts, part % parts * size
        start = chunk * CHUNK
        if start >= rows:
            release(memory)
            return
        count = min(rows - start, CHUNK)
        if chunk != held:
            for r in range(count):
                own = digits[r * each : (r + 1) * each]
                row_scales[r] = _write_digits(x[start + r], own, row_sums[r], lanes, active)
            held = chunk
        for begin in range(first, min(outputs, first + size), BLOCK):
            _multiply(all_codes + begin * steps * INPUTS, digits[: count * each], sums, steps)
            complete = outputs - begin >= BLOCK
            vectors = all_vectors + begin * 4
            for r in range(count):
                found, shifts = sums[r * each :].ctypes.data, row_sums[r].ctypes.data
                place = y[start + r, begin:].ctypes.data if complete else part_of_block.ctypes.data
                if each == 1:
                    finish_one(found, shifts, vectors, pitch, row_scales[r], place, active)
                else:
                    finish_two(found, shifts, vectors, pitch, row_scales[r], place, active)
                if not complete:
                    y[start + r, begin:] = part_of_block[: outputs - begin]


def _task(active: Any) -> Callable[[Any], None]:
    version = VERSION

    def task(numbers: Any) -> None:
        if version >= 0:  # always, see there
            multiply_digits_task(numbers, active)

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
        self._codes = in_blocks(codes)
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
