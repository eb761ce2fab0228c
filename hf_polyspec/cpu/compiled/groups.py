# SPDX-License-Identifier: Apache-2.0
"""Products of weights of 4 bits or fewer, a scale and a zero a group of inputs, on the CPU's dot products of bytes.

Activations become whole numbers of 16 bits in two digits, as for 8-bit weights (see `digits`). A group's sum of
products is exact; the groups of a row are added in their order. So a row's result is the same to the last bit whatever
other rows there are, and there is one product for any number of them.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import torch
from numba import carray, njit
from torch import Tensor

from .digit_vectors import write_two
from .digits import largest_magnitude, multiply_digits_task
from .dots import BLOCK
from .group_vectors import PAIR, finish_groups, four_group_dots, one_group_dots, two_group_dots
from .numbers import LIKE, VERSION
from .product import multiplied
from .shares import ANYBODY, next_part
from .tasks import Launch, behind, borrow, compiled, part_size, pointer, release, together, whole_lines

CHUNK = 32
"""Rows whose digits a thread holds at a time."""
WIDEST = 4096
"""Inputs of a group up to which its sum holds in 32 bits: 15 * (127 * 256 + 127) * 4096 < 2 ** 31."""
GRAIN = 16
"""What the size of a group must be a multiple of."""
_REACH = 127 * 256 + 127


@njit
def _write_row(x: Any, digits: Any, shifts: Any, sums: Any, group: Any, like: Any) -> Any:
    """One row as whole numbers of two digits, and their sum in each group; the scale that undoes it."""
    largest = largest_magnitude(x, like)
    if not largest < np.float32(np.inf):  # infinite or not a number: no number comes of it, as in torch
        digits[:], shifts[:] = 0, 0
        return np.float32(np.nan)
    largest = max(largest, np.float32(1e-30))
    steps = np.float32(_REACH) / largest
    begin, place, parts = x.ctypes.data, digits.ctypes.data, sums.ctypes.data
    for g in range(shifts.size):
        first = g * group
        write_two(begin + first * x.itemsize, place + first, parts, x.size, group, steps, like)
        shifts[g] = sums[0] * np.int32(256) + sums[1]
    return largest / np.float32(_REACH)


@njit
def _multiply(codes: Any, digits: Any, shifts: Any, scales: Any, zeros: Any, sums: Any, steps: Any) -> None:
    """One block's sums for all rows of digits `[R, 2, K]`."""
    count, groups, pitch = digits.shape[0], shifts.shape[1], digits.shape[2]
    done = 0
    while done + 4 <= count:
        place, parts = digits[done:].ctypes.data, shifts[done:].ctypes.data
        four_group_dots(codes, place, pitch, parts, scales, zeros, groups, steps, sums[done:].ctypes.data)
        done += 4
    if done + 2 <= count:
        place, parts = digits[done:].ctypes.data, shifts[done:].ctypes.data
        two_group_dots(codes, place, pitch, parts, scales, zeros, groups, steps, sums[done:].ctypes.data)
        done += 2
    if done < count:
        place, parts = digits[done:].ctypes.data, shifts[done:].ctypes.data
        one_group_dots(codes, place, pitch, parts, scales, zeros, groups, steps, sums[done:].ctypes.data)


@njit
def multiply_groups_task(task: Any, active: Any, me: Any, threads: Any) -> None:
    """`y = sum over groups of ((digits @ codes.T - sum(digits) * zeros) * scales) * the row's scale + bias`."""
    numbers = carray(pointer(task, np.int64(0)), 14)
    outputs, width, rows, size, group = numbers[1], numbers[2], numbers[3], numbers[4], numbers[6]
    all_codes, all_scales, all_zeros, biases = numbers[7], numbers[8], numbers[9], numbers[10]
    order = carray(pointer(numbers[11], np.int64(0)), width if numbers[11] else 0)
    x = carray(pointer(numbers[12], active), (rows, width))
    y = carray(pointer(numbers[13], active), (rows, outputs))
    groups, steps, most, whole, one = width // group, group // PAIR, min(rows, CHUNK), np.int32(0), np.float32(0)
    of_rows = whole_lines(most * 2 * width) + whole_lines(most * groups * 4) + whole_lines(most * 4)
    of_row = whole_lines(2 * 4) + whole_lines(width * 4) + whole_lines(BLOCK * 4)
    memory = borrow(task, of_rows + whole_lines(most * BLOCK * 4) + of_row)
    if memory == 0:
        return
    digits = carray(pointer(memory, np.int8(0)), (most, 2, width))
    shifts = carray(pointer(behind(digits), whole), (most, groups))
    row_scales = carray(pointer(behind(shifts), one), most)
    sums = carray(pointer(behind(row_scales), one), (most, BLOCK))
    both = carray(pointer(behind(sums), whole), 2)
    ordered = carray(pointer(behind(both), active), width)
    part_of_block = carray(pointer(behind(ordered), active), BLOCK)
    parts = (outputs + size - 1) // size
    me = me if rows <= CHUNK else ANYBODY
    held = -1
    while True:
        part = next_part(task, me, threads, parts)
        chunk, first = part // parts, part % parts * size
        start = chunk * CHUNK
        if start >= rows:
            release(memory)
            return
        count = min(rows - start, CHUNK)
        if chunk != held:
            for r in range(count):
                for k in range(order.size):
                    ordered[k] = x[start + r, order[k]]
                row = ordered if order.size else x[start + r]
                row_scales[r] = _write_row(row, digits[r], shifts[r], both, group, active)
            held = chunk
        for begin in range(first, min(outputs, first + size), BLOCK):
            block = begin // BLOCK
            codes, of_groups = all_codes + block * BLOCK * width // 2, block * BLOCK * groups
            _multiply(codes, digits[:count], shifts, all_scales + of_groups * 2, all_zeros + of_groups, sums, steps)
            complete = outputs - begin >= BLOCK
            for r in range(count):
                place = y[start + r, begin:].ctypes.data if complete else part_of_block.ctypes.data
                finish_groups(sums[r:].ctypes.data, row_scales[r], biases + begin * 4, place, active)
                if not complete:
                    y[start + r, begin:] = part_of_block[: outputs - begin]


@njit
def multiply_codes_task(task: Any, active: Any, me: Any, threads: Any) -> None:
    """The product of this room or that of `digits`, whichever the task is for: one says 0 digits, the other 1 or 2."""
    if carray(pointer(task, np.int64(0)), 6)[5] == 0:
        multiply_groups_task(task, active, me, threads)
    else:
        multiply_digits_task(task, active, me, threads)


def _task(active: Any) -> Callable[[Any], None]:
    version = VERSION

    def task(numbers: Any) -> None:
        if version >= 0:  # always, see there
            multiply_groups_task(numbers, active, ANYBODY, 1)

    return task


@cache
def _function(active: torch.dtype) -> Launch:
    return together(compiled(_task(LIKE[active])))


def in_words(codes: Tensor) -> Tensor:
    """Codes `[N, K]` uint8 below 16 as `[N / BLOCK, K / 8, BLOCK, 4]`, two in a byte, filled up with zeros."""
    filled = torch.nn.functional.pad(codes, (0, 0, 0, -codes.shape[0] % BLOCK))
    halves = filled.view(-1, BLOCK, codes.shape[1] // PAIR, 2, PAIR // 2)
    return (halves[:, :, :, 0] | halves[:, :, :, 1] << 4).transpose(1, 2).contiguous()


def _by_block(numbers: Tensor) -> Tensor:
    """Numbers of groups `[N, G]` as `[N / BLOCK, G, BLOCK]`, filled up with zeros."""
    filled = torch.nn.functional.pad(numbers, (0, 0, 0, -numbers.shape[0] % BLOCK))
    return filled.view(-1, BLOCK, numbers.shape[1]).transpose(1, 2).contiguous()


class GroupProduct:
    """A matrix of codes below 16 with a scale and a zero a group, multiplied with activations of two digits.

    Args:
        codes: `[N, K]` uint8 on the CPU; kept in an order of its own.
        zeros: `[N, G]` uint8, what counts as zero among the codes of a group.
        scales: `[N, G]`, which float16 holds, multiplied into a group's sum.
        bias: `[N]` or None.
        order: `[K]`, which input each column of `codes` belongs to; None if they are in order.

    Raises:
        ValueError: The K inputs are not G groups of one size, a multiple of `GRAIN` up to `WIDEST`.
    """

    dtype = torch.uint8
    """What the matrix is stored as: like that of `DigitProduct`, so that one task multiplies both."""

    def __init__(
        self, codes: Tensor, zeros: Tensor, scales: Tensor, bias: Tensor | None, order: Tensor | None = None
    ) -> None:
        self.shape = (codes.shape[0], codes.shape[1])
        self._group = codes.shape[1] // scales.shape[1]
        if self._group * scales.shape[1] != codes.shape[1] or self._group % GRAIN or self._group > WIDEST:
            raise ValueError(f"{codes.shape[1]} inputs are no {scales.shape[1]} groups of a size that is multiplied.")
        self._codes = in_words(codes)
        self._scales, self._zeros = _by_block(scales.to(torch.float16)), _by_block(zeros)
        self._biases = torch.zeros(self._codes.shape[0] * BLOCK, device="cpu")
        if bias is not None:
            self._biases[: codes.shape[0]] = bias
        self._order = None if order is None else order.to(torch.int64).contiguous()

    def task(self, rows: int, x: int, y: int) -> tuple[int, ...]:
        """The numbers of the task that multiplies rows at address `x` into `y`."""
        outputs, width = self.shape
        # Many rows are shared out by rows, so that each becomes digits once.
        size = part_size(outputs, BLOCK) if rows <= CHUNK else -(-outputs // BLOCK) * BLOCK
        matrix = (one.data_ptr() for one in (self._codes, self._scales, self._zeros, self._biases))
        order = 0 if self._order is None else self._order.data_ptr()
        return (outputs, width, rows, size, 0, self._group, *matrix, order, x, y)

    def __call__(self, x: Tensor) -> Tensor:
        return multiplied(self, x, _function)
