# SPDX-License-Identifier: Apache-2.0
"""Products with few rows at the speed of the memory.

Every weight is read once, widened to float32 in a register and used for four rows; sums are float32.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import torch
from numba import carray, njit
from torch import Tensor, nn

from .numbers import FLOATS, LIKE, VERSION, narrow, widen
from .support import DTYPES
from .tasks import compiled, part_size, pointer, run, take
from .tiles import LANES, OUTPUTS, four_rows, one_row
from .tiles import ROWS as ROWS_OF_TILE


@njit(fastmath=FLOATS)
def _add(weight: Any, x: Any, sums: Any, done: int) -> None:
    """The products from input `done` on: what is left of a width that is no multiple of a register's."""
    for r in range(x.shape[0]):
        for n in range(weight.shape[0]):
            total = np.float32(0)
            for k in range(done, x.shape[1]):
                total += widen(weight[n, k]) * x[r, k]
            sums[r, n] += total


@njit(fastmath=FLOATS)
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
            for n in range(first, last):
                total = sums[r, n - first]
                if shifts.size:
                    total -= totals[r] * shifts[n]
                if scales.size:
                    total *= scales[n]
                if bias.size:
                    total += bias[n]
                y[r, n] = narrow(total, active)


def _task(stored: Any, active: Any) -> Callable[[Any], None]:
    def task(numbers: Any) -> None:
        if VERSION >= 0:  # always, see there
            multiply_task(numbers, stored, active)

    return task


@cache
def _function(weight: torch.dtype, active: torch.dtype) -> int:
    if weight not in (torch.int8, active):
        raise TypeError(f"A {weight} matrix cannot be multiplied with {active} numbers.")
    return compiled(_task(LIKE[weight], LIKE[active]))


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
        outputs, width = self._weight.shape
        if x.shape[-1] != width or x.device.type != "cpu" or type(x) not in (Tensor, nn.Parameter):
            raise RuntimeError(f"A product of {width} inputs on the CPU was given {tuple(x.shape)} on {x.device}.")
        if x.dtype not in DTYPES:
            return self(x.float()).to(x.dtype)
        x = x.contiguous()
        y = x.new_empty(*x.shape[:-1], outputs)
        run(
            "compiled::linear",
            _function(self._weight.dtype, x.dtype),
            *self.task(x.numel() // width, x.data_ptr(), y.data_ptr()),
        )
        return y
