# SPDX-License-Identifier: Apache-2.0
"""Attention of a few positions over a cache, in float32 whatever the cache holds, keys and values read where they lie.

One head of one row of the batch is one part of the task.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any
from weakref import ref

import numpy as np
import torch
from numba import carray, njit
from torch import Tensor

from .numbers import LIKE, REORDERED, VERSION, exponential, narrow, widen
from .tasks import Launch, compiled, number, number_bits, pointer, run, take, together
from .tiles import OUTPUTS, four_means, four_rows, one_mean
from .tiles import ROWS as ROWS_OF_TILE
from .vectors import LANES

NO_MASK, ALLOWED, ADDED, CAUSAL = range(4)


@njit(fastmath=REORDERED)
def _scores(queries: Any, keys: Any, scores: Any, like: Any) -> None:
    """`[F, S]`, from queries `[F', D]` with F' rounded up to whole tiles."""
    size, seen = queries.shape[1], keys.shape[0]
    tiled = seen // OUTPUTS * OUTPUTS if size % LANES == 0 else 0
    pitch = scores.shape[1]
    for s in range(0, tiled, OUTPUTS):
        for f in range(0, queries.shape[0], ROWS_OF_TILE):
            place = scores[f, s:].ctypes.data
            four_rows(keys[s:].ctypes.data, queries[f:].ctypes.data, place, size, size, pitch, size, like)
    for s in range(tiled, seen):
        for f in range(queries.shape[0]):
            total = np.float32(0)
            for d in range(size):
                total += queries[f, d] * widen(keys[s, d])
            scores[f, s] = total


@njit(fastmath=REORDERED)
def _softmax(scores: Any) -> None:
    """One row of scores as weights; nothing where everything is hidden."""
    top, broken = np.float32(-np.inf), 0
    for s in range(scores.size):
        top = max(top, scores[s])
        broken += scores[s] != scores[s]
    if broken or top == np.float32(np.inf):  # as in torch, no number comes of it
        scores[:] = np.nan
        return
    if top == np.float32(-np.inf):
        scores[:] = 0
        return
    total = np.float32(0)
    for s in range(scores.size):
        below = scores[s] - top
        weight = exponential(below) if below > np.float32(-87.0) else np.float32(0)
        scores[s] = weight
        total += weight
    for s in range(scores.size):
        scores[s] /= total


@njit(fastmath=REORDERED)
def _means(weights: Any, values: Any, sums: Any, like: Any) -> None:
    """The mean of the values `[S, D]` under each row of weights `[F', S]`, with F' of whole tiles."""
    (seen, size), pitch = values.shape, weights.shape[1]
    wide = size // (4 * LANES) * 4 * LANES
    tiled = size // LANES * LANES
    for f in range(0, weights.shape[0], ROWS_OF_TILE):
        row = weights[f:].ctypes.data
        for d in range(0, wide, 4 * LANES):
            four_means(values[0, d:].ctypes.data, row, sums[f, d:].ctypes.data, size, pitch, seen, like)
        for d in range(wide, tiled, LANES):
            one_mean(values[0, d:].ctypes.data, row, sums[f, d:].ctypes.data, size, pitch, seen, like)
    for f in range(weights.shape[0]):
        for d in range(tiled, size):
            total = np.float32(0)
            for s in range(seen):
                total += weights[f, s] * widen(values[s, d])
            sums[f, d] = total


@njit(fastmath=REORDERED)
def attend_task(task: Any, like: Any) -> None:
    numbers = carray(pointer(task, np.int64(0)), 17)
    batch, heads, shared, fed, seen, size = numbers[1], numbers[2], numbers[3], numbers[4], numbers[5], numbers[6]
    pitch, kind, mask_rows, mask_pitch = numbers[7], numbers[8], numbers[9], numbers[10]
    scale = number(task, 11)
    all_queries = carray(pointer(numbers[12], like), (batch, heads, fed, size))
    all_keys = carray(pointer(numbers[13], like), (batch, shared, pitch, size))
    all_values = carray(pointer(numbers[14], like), (batch, shared, pitch, size))
    allowed = carray(pointer(numbers[15], np.uint8(0)), (mask_rows, fed, mask_pitch))
    added = carray(pointer(numbers[15], np.float32(0)), (mask_rows, fed, mask_pitch))
    out = carray(pointer(numbers[16], like), (batch, fed, heads, size))
    padded = (fed + ROWS_OF_TILE - 1) // ROWS_OF_TILE * ROWS_OF_TILE
    queries = np.zeros((padded, size), np.float32)
    scores = np.empty((padded, seen), np.float32)
    sums = np.empty((padded, size), np.float32)
    hidden = np.float32(-np.inf)
    while True:
        part = take(task)
        if part >= batch * heads:
            return
        b, h = part // heads, part % heads
        keys, values = all_keys[b, h * shared // heads], all_values[b, h * shared // heads]
        for f in range(fed):
            for d in range(size):
                queries[f, d] = widen(all_queries[b, h, f, d]) * scale
        _scores(queries, keys[:seen], scores, like)
        m = b if mask_rows > 1 else 0
        for f in range(fed):
            if kind == ALLOWED:
                for s in range(seen):
                    scores[f, s] = scores[f, s] if allowed[m, f, s] else hidden
            elif kind == ADDED:
                for s in range(seen):
                    scores[f, s] += added[m, f, s]
            elif kind == CAUSAL:
                scores[f, f + 1 :] = hidden
            _softmax(scores[f])
        _means(scores, values[:seen], sums, like)
        for f in range(fed):
            for d in range(size):
                out[b, f, h, d] = narrow(sums[f, d], like)


def _task(like: Any) -> Callable[[Any], None]:
    version = VERSION

    def task(numbers: Any) -> None:
        if version >= 0:  # always, see there
            attend_task(numbers, like)

    return task


@cache
def _function(dtype: torch.dtype) -> Launch:
    return together(compiled(_task(LIKE[dtype])))


def readable(states: Tensor) -> bool:
    """Whether keys or values `[B, H, S, D]` lie in memory as `attend` reads them: a view of a buffer's columns."""
    row, head, column, number = states.stride()
    size = states.shape[3]
    capacity = head // size
    ordered = number == 1 and column == size and head % size == 0 and row == states.shape[1] * capacity * size
    return ordered and capacity >= states.shape[2]


# The last mask that had to be converted, by its object and torch's count of changes: all layers of a pass are given
# the same one.
_converted: tuple[ref[Tensor], int, Tensor] | None = None


def plain_mask(mask: Tensor) -> Tensor:
    """A mask as the compiled functions read it: contiguous, bool or float32."""
    global _converted
    if mask.dtype in (torch.bool, torch.float32) and mask.is_contiguous():
        return mask
    last, count = _converted, -1 if mask.is_inference() else mask._version
    if last is not None and last[0]() is mask and last[1] == count >= 0:
        return last[2]
    found = (mask if mask.dtype is torch.bool else mask.float()).contiguous()
    _converted = ref(mask), count, found
    return found


def attend_numbers(
    sizes: tuple[int, int, int, int, int, int], pitch: int, mask: Tensor | None, scale: float, places: tuple[int, ...]
) -> tuple[int, ...]:
    """The task of `attend_task`.

    Args:
        sizes: Rows of the batch, heads, heads of keys and values, positions, columns, numbers of a head.
        pitch: Columns from one head's keys to the next head's.
        mask: A `plain_mask` `[B or 1, 1, F, S]`, or None for causal, or everything if there is one position.
        scale: Of the scores.
        places: Addresses of queries, keys, values and output.
    """
    kind, rows, mask_pitch, address = (NO_MASK if sizes[3] == 1 else CAUSAL), 1, 0, 0
    if mask is not None:
        kind = ALLOWED if mask.dtype is torch.bool else ADDED
        rows, mask_pitch, address = mask.shape[0], mask.shape[3], mask.data_ptr()
    *inputs, out = places
    return (*sizes, pitch, kind, rows, mask_pitch, number_bits(scale), *inputs, address, out)


def attend(queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """Attention as torch's `scaled_dot_product_attention` computes it, causal where there is no mask.

    Args:
        queries: `[B, heads, F, D]`, contiguous.
        keys, values: `[B, shared, S, D]`, heads a multiple of shared; `readable`, of one layout.
        mask: `[B or 1, 1, F, S]`, bool (True: seen) or added to the scores; None for causal, or everything if F is 1.
        scale: Of the scores.

    Returns:
        `[B, F, heads D]`; zeros where everything is hidden.
    """
    batch, heads, fed, size = queries.shape
    shared, seen = keys.shape[1], keys.shape[2]
    mask = None if mask is None else plain_mask(mask)
    out = queries.new_empty(batch, fed, heads * size)
    places = (queries.data_ptr(), keys.data_ptr(), values.data_ptr(), out.data_ptr())
    numbers = attend_numbers((batch, heads, shared, fed, seen, size), keys.stride(1) // size, mask, scale, places)
    run("compiled::scaled_dot_product", _function(queries.dtype), *numbers)
    return out
