# SPDX-License-Identifier: Apache-2.0
"""The small steps of a decoder block, each one call instead of five to fifteen: norm, rotation, gate.

Every step rounds where transformers' own operations round, so in 16 bits too the numbers are the same but for the
order of a sum.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import torch
from numba import carray, njit
from torch import Tensor

from .numbers import LIKE, REORDERED, VERSION, exponential, narrow, widen
from .places import address
from .tasks import (
    Launch,
    alone,
    borrow,
    compiled,
    number,
    number_bits,
    pointer,
    release,
    run,
    take,
    together,
    whole_lines,
)

PART = 4
"""Rows that a thread takes at once where several do one step."""
FEW = 32
"""Up to so many rows one thread is done before others could have been called."""


@njit
def _some_rows(task: Any, rows: Any) -> Any:
    """The first of the rows that this thread does next, and the one after the last; none of them if all are taken."""
    begin = take(task) * PART
    return begin, min(rows, begin + PART)


@njit(fastmath=REORDERED)
def normalize_task(task: Any, like: Any) -> None:
    """`y = weight * (x / rms(x))`; where an update is given, x is the sum of both, written out as well."""
    numbers = carray(pointer(task, np.int64(0)), 9)
    rows, width, epsilon = numbers[1], numbers[2], number(task, 3)
    x = carray(pointer(numbers[4], like), (rows, width))
    update = carray(pointer(numbers[5], like), (rows if numbers[5] else 0, width))
    weight = carray(pointer(numbers[6], like), width)
    y = carray(pointer(numbers[7], like), (rows, width))
    total = carray(pointer(numbers[8], like), (rows if numbers[5] else 0, width))
    memory = borrow(task, whole_lines(width * 4))
    if memory == 0:
        return
    wide = carray(pointer(memory, np.float32(0)), width)
    while True:
        begin, end = _some_rows(task, rows)
        if begin >= end:
            release(memory)
            return
        for r in range(begin, end):
            squares = np.float32(0)
            if update.shape[0]:
                for k in range(width):
                    total[r, k] = narrow(widen(x[r, k]) + widen(update[r, k]), like)
                    wide[k] = widen(total[r, k])
            else:
                for k in range(width):
                    wide[k] = widen(x[r, k])
            for k in range(width):
                squares += wide[k] * wide[k]
            scale = np.float32(1) / np.sqrt(squares / np.float32(width) + epsilon)
            for k in range(width):
                y[r, k] = narrow(widen(weight[k]) * widen(narrow(wide[k] * scale, like)), like)


@njit(fastmath=False)  # said, for callers' leave to contract is inherited: a CPU with float16 would round once
def _turn(joint: Any, out: Any, cos: Any, sin: Any, like: Any) -> None:
    """One head at one position."""
    half = out.size // 2
    for d in range(half):
        a, b = widen(joint[d]), widen(joint[d + half])
        first = widen(narrow(a * widen(cos[d]), like)) + widen(narrow(-b * widen(sin[d]), like))
        other = widen(narrow(b * widen(cos[d + half]), like)) + widen(narrow(a * widen(sin[d + half]), like))
        out[d], out[d + half] = narrow(first, like), narrow(other, like)


@njit(fastmath=REORDERED)
def rotate_task(task: Any, like: Any) -> None:
    """Queries and keys turned by their position (RoFormer, Su et al. 2021, with halves), values laid out by head."""
    numbers = carray(pointer(task, np.int64(0)), 15)
    batch, fed, heads, shared, size, turns = numbers[1], numbers[2], numbers[3], numbers[4], numbers[5], numbers[6]
    joint = carray(pointer(numbers[7], like), (batch, fed, heads + 2 * shared, size))
    cos = carray(pointer(numbers[8], like), (turns, fed, size))
    sin = carray(pointer(numbers[9], like), (turns, fed, size))
    queries = carray(pointer(numbers[10], like), (batch, heads, fed, size))
    # Keys and values go to the first columns of what may be a longer buffer, or each to a column of its own.
    keys = carray(pointer(numbers[11], like), (batch, shared, numbers[13], size))
    values = carray(pointer(numbers[12], like), (batch, shared, numbers[13], size))
    columns = carray(pointer(numbers[14], np.int64(0)), (fed if numbers[14] else 0))
    while True:
        begin, end = _some_rows(task, batch * fed)
        if begin >= end:
            return
        for r in range(begin, end):
            b, f = r // fed, r % fed
            t = b if turns > 1 else 0
            for h in range(heads):
                _turn(joint[b, f, h], queries[b, h, f], cos[t, f], sin[t, f], like)
            column = columns[f] if columns.size else f
            for h in range(shared):
                _turn(joint[b, f, heads + h], keys[b, h, column], cos[t, f], sin[t, f], like)
                values[b, h, column] = joint[b, f, heads + shared + h]


@njit(fastmath=REORDERED)
def gate_task(task: Any, like: Any) -> None:
    """`silu(gate) * up` of `[R, 2 I]`."""
    numbers = carray(pointer(task, np.int64(0)), 5)
    rows, width = numbers[1], numbers[2]
    joint = carray(pointer(numbers[3], like), (rows, 2, width))
    y = carray(pointer(numbers[4], like), (rows, width))
    while True:
        begin, end = _some_rows(task, rows)
        if begin >= end:
            return
        for r in range(begin, end):
            for k in range(width):
                g = widen(joint[r, 0, k])
                shut = g < np.float32(-88) and g > np.float32(-np.inf)  # `exponential` ends at 88
                opened = narrow(np.float32(0) if shut else g / (np.float32(1) + exponential(-g)), like)
                y[r, k] = narrow(widen(opened) * widen(joint[r, 1, k]), like)


@njit(fastmath=REORDERED)
def add_task(task: Any, like: Any) -> None:
    """`y = x + update`, row by row."""
    numbers = carray(pointer(task, np.int64(0)), 6)
    rows, width = numbers[1], numbers[2]
    x, update = carray(pointer(numbers[3], like), (rows, width)), carray(pointer(numbers[4], like), (rows, width))
    y = carray(pointer(numbers[5], like), (rows, width))
    while True:
        begin, end = _some_rows(task, rows)
        if begin >= end:
            return
        for r in range(begin, end):
            for k in range(width):
                y[r, k] = narrow(widen(x[r, k]) + widen(update[r, k]), like)


def _normalizing(like: Any) -> Callable[[Any], None]:
    version = VERSION

    def task(numbers: Any) -> None:
        if version >= 0:  # always, see there
            normalize_task(numbers, like)

    return task


def _rotating(like: Any) -> Callable[[Any], None]:
    version = VERSION

    def task(numbers: Any) -> None:
        if version >= 0:
            rotate_task(numbers, like)

    return task


def _gating(like: Any) -> Callable[[Any], None]:
    version = VERSION

    def task(numbers: Any) -> None:
        if version >= 0:
            gate_task(numbers, like)

    return task


@cache
def _function(step: Callable[[Any], Callable[[Any], None]], dtype: torch.dtype, many: bool) -> Launch:
    return (together if many else alone)(compiled(step(LIKE[dtype])))


def norming(dtype: torch.dtype) -> Launch:
    """What normalises a few rows, see `norm_numbers`."""
    return _function(_normalizing, dtype, False)


def norm_numbers(
    rows: int, weight: Tensor, epsilon: float, x: int, y: int, update: int = 0, total: int = 0
) -> tuple[int, ...]:
    """The task of `normalize_task`; addresses of rows in and out, and of an update and the sum, 0 for none."""
    return (rows, weight.shape[0], number_bits(epsilon), x, update, address(weight, "weights of a norm"), y, total)


def rotate_numbers(
    sizes: tuple[int, int, int, int],
    turns: tuple[Tensor, Tensor],
    joint: int,
    out: tuple[int, int, int],
    pitch: int,
    columns: int = 0,
) -> tuple[int, ...]:
    """The task of `rotate_task`.

    Args:
        sizes: Rows of the batch, positions, heads, heads of keys and values.
        turns: Cosines and sines `[B or 1, F, D]`.
        joint: Address of queries, keys and values side by side; out: of the three apart.
        pitch: Columns from one head's keys to the next head's.
        columns: Address of the column for the keys and values of each position, 0 for the first ones.
    """
    cos, sin = turns
    places = address(cos, "cosines"), address(sin, "sines")
    return (*sizes, cos.shape[2], cos.shape[0], joint, *places, *out, pitch, columns)


def rms_norm(x: Tensor, weight: Tensor, epsilon: float, update: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """A root-mean-square norm, perhaps of a sum.

    Args:
        x: `[..., K]`, contiguous; weight: `[K]` of the same dtype; epsilon: added to the mean square.
        update: Added to x before; None for nothing.

    Returns:
        The normalised rows, and x with the update.

    Raises:
        RuntimeError: The shapes do not fit each other, or something has lost its memory.
        MemoryError: There is no memory to work in.
    """
    if weight.shape != x.shape[-1:] or (update is not None and update.shape != x.shape):
        added = "nothing" if update is None else tuple(update.shape)
        raise RuntimeError(f"A norm of {tuple(weight.shape)} weights was given {tuple(x.shape)}, to be added {added}.")
    y = torch.empty_like(x)
    total = x if update is None else torch.empty_like(x)
    added = (0, 0) if update is None else (address(update, "numbers to add"), total.data_ptr())
    rows = x.numel() // x.shape[-1]
    numbers = norm_numbers(rows, weight, epsilon, address(x, "hidden states"), y.data_ptr(), *added)
    run("compiled::rms_norm", _function(_normalizing, x.dtype, rows > FEW), *numbers)
    return y, total


def rotate(joint: Tensor, cos: Tensor, sin: Tensor, heads: int, shared: int) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of one block.

    Args:
        joint: `[B, F, (heads + 2 shared) D]`: queries, keys and values side by side, contiguous.
        cos, sin: `[B or 1, F, D]` of the same dtype, contiguous.
        heads: Query heads; shared: heads of keys and values.

    Returns:
        `[B, heads, F, D]`, and keys and values `[B, shared, F, D]`.

    Raises:
        RuntimeError: The shapes do not fit each other, or something has lost its memory.
    """
    batch, fed, width = joint.shape
    size = cos.shape[-1]
    if width != (heads + 2 * shared) * size or cos.shape[0] not in (1, batch) or cos.shape[1] != fed:
        raise RuntimeError(
            f"{heads} heads of queries and {shared} of keys and values with angles {tuple(cos.shape)} were given "
            f"{tuple(joint.shape)}."
        )
    if sin.shape != cos.shape:
        raise RuntimeError(f"There are cosines {tuple(cos.shape)} for sines {tuple(sin.shape)}.")
    queries = joint.new_empty(batch, heads, fed, size)
    keys, values = joint.new_empty(2, batch, shared, fed, size).unbind()
    out = (queries.data_ptr(), keys.data_ptr(), values.data_ptr())
    numbers = rotate_numbers(
        (batch, fed, heads, shared), (cos, sin), address(joint, "queries, keys and values"), out, fed
    )
    run("compiled::rotate", _function(_rotating, joint.dtype, batch * fed > FEW), *numbers)
    return queries, keys, values


def gated(joint: Tensor) -> Tensor:
    """`silu(gate) * up` of `[..., 2 I]` with gate and up side by side, contiguous.

    Raises:
        RuntimeError: They are not as many, or have lost their memory.
    """
    width = joint.shape[-1] // 2
    if joint.shape[-1] % 2:
        raise RuntimeError(f"Gate and up are as many as each other, together not {joint.shape[-1]}.")
    y = joint.new_empty(*joint.shape[:-1], width)
    rows = y.numel() // width
    places = address(joint, "gates"), y.data_ptr()
    run("compiled::gate", _function(_gating, joint.dtype, rows > FEW), rows, width, *places)
    return y
