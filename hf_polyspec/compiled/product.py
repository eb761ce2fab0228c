# SPDX-License-Identifier: Apache-2.0
"""Products with few rows at the speed of the memory.

Every weight is read once, widened to float32 in a register and used for four rows; sums are float32.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any, Protocol

import numpy as np
import torch
from numba import carray, njit
from torch import Tensor, nn

from .numbers import LIKE, REORDERED, VERSION, narrow, widen
from .support import DTYPES
from .tasks import Launch, compiled, part_size, pointer, run, take, together
from .tiles import OUTPUTS, four_rows, one_row
from .tiles import ROWS as ROWS_OF_TILE
from .vectors import LANES, round_into


@njit(fastmath=REORDERED)
def _add(weight: Any, x: Any, sums: Any, done: int) -> None:
    """The products from input `done` on: what is left of a width that is no multiple of a register's."""
    for r in range(x.shape[0]):
        for n in range(weight.shape[0]):
            total = np.float32(0)
            for k in range(done, x.shape[1]):
                total += widen(weight[n, k]) * x[r, k]
            sums[r, n] += total


@njit(fastmath=REORDERED)
def _finish(sums: Any, shifts: Any, total: Any, scales: Any, bias: Any) -> None:
    """What one row's sums stand for; each loop by itself, so that it runs in registers."""
    for n in range(shifts.size):
        sums[n] -= total * shifts[n]
    for n in range(scales.size):
        sums[n] *= scales[n]
    for n in range(bias.size):
        sums[n] += bias[n]


@njit
def _put(sums: Any, y: Any, like: Any) -> None:
    """Round sums of one row into `y`."""
    done = y.size // LANES * LANES
    round_into(sums.ctypes.data, y.ctypes.data, done, like)
    for n in range(done, y.size):
        y[n] = narrow(sums[n], like)


@njit(fastmath=REORDERED)
def multiply_task(task: Any, stored: Any, active: Any) -> None:
    """`y = (x @ weight.T - sum(x) * shifts) * scales + bias`; vectors whose address is 0 are left out."""
    numbers = carray(pointer(task, np.int64(0)), 11)
    outputs, width, rows, size = numbers[1], numbers[2], numbers[3], numbers[4]
    weight = carray(pointer(numbers[5], stored), (outputs, width))
    scales = carray(pointer(numbers[6], np.float32(0)), outputs if numbers[6] else 0)
    shifts = carray(pointer(numbers[7], np.float32(0)), outputs if numbers[7] else 0)
    bias = carray(pointer(numbers[8], np.float32(0)), outputs if numbers[8] else 0)
    x = carray(pointer(numbers[9], active), (rows, width))
    y = carray(pointer(numbers[10], active), (rows, outputs))
    padded = 1 if rows == 1 else (rows + ROWS_OF_TILE - 1) // ROWS_OF_TILE * ROWS_OF_TILE
    wide = np.zeros((padded, width), np.float32)
    totals = np.zeros(padded, np.float32)
    for r in range(rows):
        for k in range(width):
            wide[r, k] = widen(x[r, k])
        if shifts.size:
            totals[r] = wide[r].sum()
    sums = np.empty((padded, size), np.float32)
    done = width // LANES * LANES
    while True:
        first = take(task) * size
        if first >= outputs:
            return
        last = min(outputs, first + size)
        tiled = first + (last - first) // OUTPUTS * OUTPUTS
        for n in range(first, tiled, OUTPUTS):
            begin = weight[n:].ctypes.data
            if rows == 1:
                one_row(begin, wide.ctypes.data, sums[0, n - first :].ctypes.data, width, width, size, done, stored)
            else:
                for r in range(0, padded, ROWS_OF_TILE):
                    place = sums[r, n - first :].ctypes.data
                    four_rows(begin, wide[r:].ctypes.data, place, width, width, size, done, stored)
        sums[:, tiled - first : last - first] = 0
        _add(weight[first:tiled], wide, sums, done)
        _add(weight[tiled:last], wide, sums[:, tiled - first :], 0)
        for r in range(rows):
            row = sums[r, : last - first]
            _finish(row, shifts[first:last], totals[r], scales[first:last], bias[first:last])
            _put(row, y[r, first:last], active)


def _task(stored: Any, active: Any) -> Callable[[Any], None]:
    version = VERSION

    def task(numbers: Any) -> None:
        if version >= 0:  # always, see there
            multiply_task(numbers, stored, active)

    return task


@cache
def _function(weight: torch.dtype, active: torch.dtype) -> Launch:
    if weight not in (torch.int8, active):
        raise TypeError(f"A {weight} matrix cannot be multiplied with {active} numbers.")
    return together(compiled(_task(LIKE[weight], LIKE[active])))


class CompiledProduct:
    """A matrix multiplied in float32 whatever it is stored as; its memory is read where it lies.

    Args:
        weight: `[N, K]` on the CPU: int8, or float32, bfloat16 or float16 like the inputs.
        bias: `[N]` or None.
        scales: `[N]`, multiplied into the result; None for one.
        zeros: `[N]`, what counts as zero among the weights; None for zero.
    """

    def __init__(
        self, weight: Tensor, bias: Tensor | None, scales: Tensor | None = None, zeros: Tensor | None = None
    ) -> None:
        self._weight = weight.detach().contiguous()
        # Copies, since nobody else may move them; the matrix is not copied, it is what fills the memory.
        parts = (scales, zeros, bias)
        self._vectors = tuple(None if part is None else part.detach().float().clone() for part in parts)

    @property
    def dtype(self) -> torch.dtype:
        """What the matrix is stored as."""
        return self._weight.dtype

    @property
    def shape(self) -> tuple[int, int]:
        """Outputs and inputs."""
        return self._weight.shape[0], self._weight.shape[1]

    def task(self, rows: int, x: int, y: int) -> tuple[int, ...]:
        """The numbers of the task that multiplies rows at address `x` into `y`."""
        outputs, width = self._weight.shape
        sizes = (outputs, width, rows, part_size(outputs, OUTPUTS))
        vectors = (0 if vector is None else vector.data_ptr() for vector in self._vectors)
        return (*sizes, self._weight.data_ptr(), *vectors, x, y)

    def __call__(self, x: Tensor) -> Tensor:
        return multiplied(self, x, partial(_function, self._weight.dtype))


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
        RuntimeError: x has another width, is elsewhere, or is no plain tensor.
    """
    outputs, width = product.shape
    if x.shape[-1] != width or x.device.type != "cpu" or type(x) not in (Tensor, nn.Parameter):
        raise RuntimeError(f"A product of {width} inputs on the CPU was given {tuple(x.shape)} on {x.device}.")
    if x.dtype not in DTYPES:
        return multiplied(product, x.float(), function).to(x.dtype)
    x = x.contiguous()
    y = x.new_empty(*x.shape[:-1], outputs)
    run("compiled::linear", function(x.dtype), *product.task(x.numel() // width, x.data_ptr(), y.data_ptr()))
    return y
