# SPDX-License-Identifier: Apache-2.0
"""Products at the speed of the memory for few rows, at that of the arithmetic for many.

Every weight is widened to float32 in a register and used for up to twelve rows; sums are float32. Where the CPU
multiplies pairs of bfloat16 nothing is widened.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any, Protocol

import numpy as np
import torch
from numba import carray, njit
from numba.extending import overload
from torch import Tensor, nn

from .amx import DEPTH, LINES, ROWS, TILES, done, lines_of, one_of_pairs, reshaped, two_of_pairs
from .numbers import LIKE, VERSION
from .pages import laid_out
from .pairs import deep, operand, operand_kind, paired
from .panels import (
    LINE,
    MOST,
    WIDTH,
    eight_rows,
    finish,
    four_rows,
    in_panels,
    one_row,
    six_rows,
    ten_rows,
    twelve_rows,
    two_rows,
)
from .places import address
from .shares import ANYBODY, next_part
from .support import DTYPES
from .tasks import (
    Launch,
    behind,
    borrow,
    compiled,
    part_size,
    pointer,
    run,
    together,
    whole_lines,
)

CHUNK = 96
"""Rows that a thread holds at a time."""
SPARE = 4
"""Rows behind the last one: those of an odd number are multiplied with one more, in tiles with up to four."""


@njit
def _multiply(
    rows: Any, panel: Any, x: Any, sums: Any, inputs: Any, pitch: Any, ahead: Any, pace: Any, stored: Any
) -> None:
    """The sums of one panel for at least so many rows of float32, at most `MOST`."""
    if rows == 1:
        one_row(panel, x, sums, inputs, pitch, ahead, pace, stored)
    elif rows == 2:
        two_rows(panel, x, sums, inputs, pitch, ahead, pace, stored)
    elif rows <= 4:
        four_rows(panel, x, sums, inputs, pitch, ahead, pace, stored)
    elif rows <= 6:
        six_rows(panel, x, sums, inputs, pitch, ahead, pace, stored)
    elif rows <= 8:
        eight_rows(panel, x, sums, inputs, pitch, ahead, pace, stored)
    elif rows <= 10:
        ten_rows(panel, x, sums, inputs, pitch, ahead, pace, stored)
    else:
        twelve_rows(panel, x, sums, inputs, pitch, ahead, pace, stored)


def _in_tiles(stored: Any) -> Any:
    """Whether weights of a kind are multiplied in tiles."""
    raise NotImplementedError


@overload(_in_tiles, strict=False)
def _tiles_of(stored: Any) -> Any:
    tiles = TILES and paired(stored)
    return lambda stored: tiles


@njit
def _at_once(count: Any, stored: Any) -> Any:
    """How many of so many rows are multiplied at once: as few as the registers or tiles ask for."""
    most = ROWS if _in_tiles(stored) else MOST
    groups = (count + most - 1) // most
    return (count + groups - 1) // groups


@njit
def _sums(
    lines: Any, rows: Any, panel: Any, x: Any, sums: Any, columns: Any, inputs: Any, pitch: Any, ahead: Any, pace: Any,
    stored: Any,
) -> None:  # fmt: skip
    """The sums of one panel for at least so many rows as they are multiplied: in tiles of so many lines, if any."""
    if lines == 0:
        _multiply(rows, panel, x, sums, inputs, pitch, ahead, pace, stored)
    elif rows <= lines:
        one_of_pairs(panel, x, sums, lines, pitch, 2 * columns // DEPTH, ahead, pace * LINES // LINE * LINE)
    else:
        two_of_pairs(panel, x, sums, lines, pitch, 2 * columns // DEPTH, ahead, pace * LINES // LINE * LINE)


@njit
def multiply_task(task: Any, stored: Any, active: Any, me: Any, threads: Any) -> None:
    """`y = (x @ weight.T - sum(x) * zeros) * scales + bias`; which thread this is as in `next_part`."""
    numbers = carray(pointer(task, np.int64(0)), 10)
    outputs, inputs, rows, size = numbers[1], numbers[2], numbers[3], numbers[4]
    all_panels, all_vectors, shifted = numbers[5], numbers[6], numbers[7]
    x = carray(pointer(numbers[8], active), (rows, inputs))
    y = carray(pointer(numbers[9], active), (rows, outputs))
    bytes_each = carray(pointer(0, stored), 1).itemsize
    pitch = (outputs + WIDTH - 1) // WIDTH * WIDTH * 4
    most, columns, kind, like = min(rows, CHUNK), deep(inputs, stored), operand_kind(stored), np.float32(0)
    at_once = 4 // carray(pointer(0, kind), 1).itemsize  # inputs of a step
    room = ROWS if _in_tiles(stored) else MOST
    of_rows, of_sums = whole_lines((most + SPARE) * columns * (4 // at_once)), whole_lines(room * WIDTH * 4)
    memory = borrow(task, of_rows + whole_lines(most * 4) + 2 * of_sums)
    if memory == 0:
        return
    wide = carray(pointer(memory, kind), (most + SPARE, columns))
    totals = carray(pointer(behind(wide), like), most)
    sums = carray(pointer(behind(totals), like), (room, WIDTH))
    part_of_panel = carray(pointer(behind(sums), active), (room, WIDTH))
    apart, found = wide.strides[0], sums.ctypes.data
    wide[:] = 0
    totals[:] = 0
    parts = (outputs + size - 1) // size
    me = me if rows <= CHUNK else ANYBODY
    held, lines, each, part = -1, 0, 0, next_part(task, me, threads, parts)
    while True:
        chunk, first = part // parts, part % parts * size
        start = chunk * CHUNK
        if start >= rows:
            done(memory, lines)
            return
        count = min(rows - start, CHUNK)
        if chunk != held:
            for r in range(count):
                for k in range(inputs):
                    wide[r, k] = operand(x[start + r, k], stored)
                if shifted:
                    totals[r] = wide[r].sum()
            held, each = chunk, _at_once(count, stored)
            lines = reshaped(lines_of(each) if _in_tiles(stored) else 0, lines)
        # A panel that waits for the memory does not multiply: the next one is asked for all the time.
        pace = WIDTH * bytes_each * at_once // ((count + each - 1) // each)
        end = min(outputs, first + size)
        for begin in range(first, end, WIDTH):
            panel, following = all_panels + begin * columns * bytes_each, begin + WIDTH
            if following >= end:
                part = next_part(task, me, threads, parts)
                following = part % parts * size if part // parts * CHUNK < rows else begin
            vectors, whole = all_vectors + begin * 4, outputs - begin >= WIDTH
            ahead = all_panels + following * columns * bytes_each
            for top in range(0, count, each):
                some, own = min(each, count - top), wide.ctypes.data + top * apart
                _sums(lines, some, panel, own, found, columns, inputs, apart, ahead, pace, stored)
                ahead += columns // at_once * pace
                place, step = y.ctypes.data + ((start + top) * outputs + begin) * y.itemsize, outputs * y.itemsize
                if not whole:
                    place, step = part_of_panel.ctypes.data, WIDTH * y.itemsize
                finish(found, vectors, pitch, totals.ctypes.data + top * 4, place, step, some, active)
                if not whole:
                    y[start + top : start + top + some, begin:] = part_of_panel[:some, : outputs - begin]


def _task(stored: Any, active: Any) -> Callable[[Any], None]:
    version = VERSION

    def task(numbers: Any) -> None:
        if version >= 0:  # always, see there
            multiply_task(numbers, stored, active, ANYBODY, 1)

    return task


@cache
def _function(weight: torch.dtype, active: torch.dtype) -> Launch:
    if weight not in (torch.int8, active):
        raise TypeError(f"A {weight} matrix cannot be multiplied with {active} numbers.")
    return together(compiled(_task(LIKE[weight], LIKE[active])))


def multiplying(dtype: torch.dtype) -> Launch:
    """What multiplies rows with a matrix of their own dtype, see `CompiledProduct.task`."""
    return _function(dtype, dtype)


class CompiledProduct:
    """A matrix multiplied in float32 whatever it is stored as, for any number of rows.

    A row's result is the same to the last bit whatever other rows there are.

    Args:
        weight: `[N, K]` on the CPU: int8, or float32, bfloat16 or float16 like the inputs; kept in an order of its own.
        bias: `[N]` or None.
        scales: `[N]`, multiplied into the result; None for one.
        zeros: `[N]`, what counts as zero among the weights; None for zero.
    """

    def __init__(
        self, weight: Tensor, bias: Tensor | None, scales: Tensor | None = None, zeros: Tensor | None = None
    ) -> None:
        self.shape = (weight.shape[0], weight.shape[1])
        """Outputs and inputs."""
        self._panels = laid_out(in_panels(weight.detach()))
        vectors = torch.zeros(3, self._panels.shape[0] * WIDTH, device="cpu")
        vectors[1] = 1
        for vector, given in zip(vectors, (zeros, scales, bias), strict=True):
            if given is not None:
                vector[: self.shape[0]] = given.detach()
        self._vectors, self._shifted = vectors, zeros is not None

    @property
    def dtype(self) -> torch.dtype:
        """What the matrix is stored as."""
        return self._panels.dtype

    def task(self, rows: int, x: int, y: int) -> tuple[int, ...]:
        """The numbers of the task that multiplies rows at address `x` into `y`."""
        outputs, inputs = self.shape
        sizes = (outputs, inputs, rows, part_size(outputs, WIDTH))
        return (*sizes, self._panels.data_ptr(), self._vectors.data_ptr(), int(self._shifted), x, y)

    def __call__(self, x: Tensor) -> Tensor:
        return multiplied(self, x, partial(_function, self.dtype))


class Product(Protocol):
    """A matrix that a compiled function multiplies."""

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def shape(self) -> tuple[int, int]: ...

    def task(self, rows: int, x: int, y: int) -> tuple[int, ...]: ...


def multiplied(product: Product, x: Tensor, function: Callable[[torch.dtype], Launch]) -> Tensor:
    """Rows times a matrix.

    Args:
        product: The matrix.
        x: `[..., K]` on the CPU.
        function: Gives the compiled function for inputs of a dtype.

    Returns:
        `[..., N]` in x's dtype.

    Raises:
        RuntimeError: x has another width, is elsewhere, has lost its memory, or is no plain tensor.
        MemoryError: There is no memory to work in.
    """
    outputs, width = product.shape
    if x.shape[-1] != width or x.device.type != "cpu" or type(x) not in (Tensor, nn.Parameter):
        raise RuntimeError(f"A product of {width} inputs on the CPU was given {tuple(x.shape)} on {x.device}.")
    if x.dtype not in DTYPES:
        return multiplied(product, x.float(), function).to(x.dtype)
    x = x.contiguous()
    y = x.new_empty(*x.shape[:-1], outputs)
    run("compiled::linear", function(x.dtype), *product.task(x.numel() // width, address(x, "inputs"), y.data_ptr()))
    return y
