# SPDX-License-Identifier: Apache-2.0
"""Attention over a cache, in float32 whatever the cache holds, keys and values read where they lie.

Some positions of one head of one row of the batch are one part of the task. What a position gets does not depend on
the other positions of the pass, to the last bit: sums run in an order that further columns do not change, and hidden
columns add zeros.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any
from weakref import ref

import numpy as np
import torch
from numba import carray, njit
from torch import Tensor

from .amx import LINES, done
from .attention_products import ROWS, mean, room_for_tiles, score, take_query
from .numbers import LIKE, VERSION, narrow
from .places import address
from .row_vectors import largest, powers
from .tasks import (
    Launch,
    behind,
    borrow,
    compiled,
    number,
    number_bits,
    pointer,
    run,
    take,
    together,
    whole_lines,
)
from .tiles import OUTPUTS
from .vectors import LANES

NO_MASK, ALLOWED, ADDED, CAUSAL, APART = range(5)
POSITIONS = 32
"""Positions of a part."""


@njit
def _weigh(scores: Any, seen: Any) -> Any:
    """One row of scores as weights, whose sum is returned; weights are 0 where everything is hidden.

    `scores` is as long as a multiple of `LANES`; behind the first `seen` there may be anything.
    """
    scores[seen:] = -np.inf
    top = largest(scores.ctypes.data, scores.size, np.float32(0))
    if top == np.float32(np.inf):  # or no number: as in torch, no number comes of it
        scores[:seen] = np.nan
        return np.float32(1)
    if top == np.float32(-np.inf):
        scores[:] = 0
        return np.float32(1)
    return powers(scores.ctypes.data, scores.size, top)


@njit(fastmath={"contract"})
def _hide(scores: Any, kind: Any, allowed: Any, added: Any, first: Any) -> None:
    """Apply the mask of some positions, the first of which is position `first` of the pass."""
    hidden = np.float32(-np.inf)
    for f in range(scores.shape[0]):
        if kind == ALLOWED:
            for s in range(allowed.shape[1]):
                scores[f, s] = scores[f, s] if allowed[first + f, s] else hidden
        elif kind == ADDED:
            for s in range(added.shape[1]):
                scores[f, s] += added[first + f, s]
        elif kind == CAUSAL:
            scores[f, first + f + 1 :] = hidden


@njit(fastmath={"contract"})
def _attend_apart(task: Any, like: Any) -> None:
    """Some positions of one row of the batch, under all heads that read the same keys, are one part of the task.

    Each of those heads and positions is a row of the tiles, so that a row of the batch with one new position fills
    them too, and its keys and values are read once.
    """
    numbers = carray(pointer(task, np.int64(0)), 17)
    heads, shared, fed, most, size, pitch = numbers[2], numbers[3], numbers[4], numbers[5], numbers[6], numbers[7]
    jobs, longest, scale, group = numbers[9], numbers[10], number(task, 11), numbers[2] // numbers[3]
    all_queries = carray(pointer(numbers[12], like), (heads, fed, size))
    all_keys = carray(pointer(numbers[13], like), (shared, pitch, size))
    all_values = carray(pointer(numbers[14], like), (shared, pitch, size))
    table = carray(pointer(numbers[15], np.int64(0)), (jobs, 4))
    out = carray(pointer(numbers[16], like), (fed, heads, size))
    padded = (most * group + ROWS - 1) // ROWS * ROWS
    all_columns, one = (longest + LANES - 1) // LANES * LANES, np.float32(0)
    of_queries, of_scores = whole_lines(padded * size * 4), whole_lines(padded * all_columns * 4)
    in_tiles = room_for_tiles(padded, size, like)
    room = 2 * of_queries + of_scores + whole_lines(padded * 4) + whole_lines(OUTPUTS * size * 4)
    memory = borrow(task, room + in_tiles)
    if memory == 0:
        return
    queries = carray(pointer(memory, one), (padded, size))
    scores = carray(pointer(behind(queries), one), (padded, all_columns))
    sums = carray(pointer(behind(scores), one), (padded, size))
    totals = carray(pointer(behind(sums), one), padded)
    few = carray(pointer(behind(totals), like), (OUTPUTS, size))
    active = carray(pointer(behind(few), like), (padded + LINES if in_tiles else 0, size))
    queries[:], shaped = 0, 0
    while True:
        part = take(task)
        if part >= jobs * shared:
            done(memory, shaped)
            return
        job, h = part // shared, part % shared
        first, count, base, columns = table[job, 0], table[job, 1], table[job, 2], table[job, 3]
        keys, values = all_keys[h, base : base + columns], all_values[h, base : base + columns]
        rows = group * count
        for r in range(rows):
            take_query(all_queries[h * group + r // count, first + r % count], queries, active, r, scale)
        shaped = score(rows, queries, active, keys, scores, few, scale, shaped, like)
        wide = (columns + LANES - 1) // LANES * LANES
        for r in range(rows):
            seen = columns - count + r % count + 1
            scores[r, seen:columns] = np.float32(-np.inf)
            totals[r] = _weigh(scores[r, :wide], columns)
        mean(rows, scores, active, values, sums, like)
        for r in range(rows):
            g, f = r // count, r % count
            for d in range(size):
                out[first + f, h * group + g, d] = narrow(sums[r, d] / totals[r], like)


@njit(fastmath={"contract"})
def attend_task(task: Any, like: Any) -> None:
    numbers = carray(pointer(task, np.int64(0)), 17)
    if numbers[8] == APART:
        _attend_apart(task, like)
        return
    batch, heads, shared, fed, seen, size = numbers[1], numbers[2], numbers[3], numbers[4], numbers[5], numbers[6]
    pitch, kind, mask_rows, mask_pitch = numbers[7], numbers[8], numbers[9], numbers[10]
    scale = number(task, 11)
    all_queries = carray(pointer(numbers[12], like), (batch, heads, fed, size))
    all_keys = carray(pointer(numbers[13], like), (batch, shared, pitch, size))
    all_values = carray(pointer(numbers[14], like), (batch, shared, pitch, size))
    allowed = carray(pointer(numbers[15], np.uint8(0)), (mask_rows, fed, mask_pitch))
    added = carray(pointer(numbers[15], np.float32(0)), (mask_rows, fed, mask_pitch))
    out = carray(pointer(numbers[16], like), (batch, fed, heads, size))
    padded = (min(fed, POSITIONS) + ROWS - 1) // ROWS * ROWS
    all_columns, one = (seen + LANES - 1) // LANES * LANES, np.float32(0)
    of_queries, of_scores = whole_lines(padded * size * 4), whole_lines(padded * all_columns * 4)
    in_tiles = room_for_tiles(padded, size, like)
    room = 2 * of_queries + of_scores + whole_lines(padded * 4) + whole_lines(OUTPUTS * size * 4)
    memory = borrow(task, room + in_tiles)
    if memory == 0:
        return
    queries = carray(pointer(memory, one), (padded, size))
    scores = carray(pointer(behind(queries), one), (padded, all_columns))
    sums = carray(pointer(behind(scores), one), (padded, size))
    totals = carray(pointer(behind(sums), one), padded)
    few = carray(pointer(behind(totals), like), (OUTPUTS, size))
    active = carray(pointer(behind(few), like), (padded + LINES if in_tiles else 0, size))
    queries[:], shaped = 0, 0
    blocks = (fed + POSITIONS - 1) // POSITIONS
    while True:
        part = take(task)
        if part >= batch * heads * blocks:
            done(memory, shaped)
            return
        b, h, block = part // heads % batch, part % heads, blocks - 1 - part // (batch * heads)
        keys, values = all_keys[b, h * shared // heads], all_values[b, h * shared // heads]
        first = block * POSITIONS
        count = min(fed - first, POSITIONS)
        columns = first + count if kind == CAUSAL else seen  # the last of these positions sees no further
        for f in range(count):
            take_query(all_queries[b, h, first + f], queries, active, f, scale)
        shaped = score(count, queries, active, keys[:columns], scores, few, scale, shaped, like)
        m = b if mask_rows > 1 else 0
        _hide(scores[:count, :columns], kind, allowed[m, :, :columns], added[m, :, :columns], first)
        wide = (columns + LANES - 1) // LANES * LANES
        for f in range(count):
            totals[f] = _weigh(scores[f, :wide], columns)
        mean(count, scores, active, values[:columns], sums, like)
        for f in range(count):
            for d in range(size):
                out[b, first + f, h, d] = narrow(sums[f, d] / totals[f], like)


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


def jobs_apart(spans: Sequence[tuple[int, int, int, int]], group: int) -> Tensor:
    """The table of parts for rows that each have a region of keys and values: `[parts, 4]`, the longest first.

    Args:
        spans: Of each row, its first position in the pass, how many there are, where its region begins, and the columns
            that the last of its positions sees, each of the others one less than the next.
        group: Query heads that read the same keys.
    """
    most = max(1, POSITIONS // group)
    parts = [
        (first + start, min(most, count - start), base, columns - count + min(count, start + most))
        for first, count, base, columns in spans
        for start in range(0, count, most)
    ]
    return torch.from_numpy(np.array(sorted(parts, key=lambda part: -part[3]), np.int64))


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
    sizes: tuple[int, int, int, int, int, int],
    pitch: int,
    mask: Tensor | None,
    scale: float,
    places: tuple[int, ...],
    jobs: Tensor | None = None,
) -> tuple[int, ...]:
    """The task of `attend_task`.

    Args:
        sizes: Rows of the batch, heads, heads of keys and values, positions, columns, numbers of a head.
        pitch: Columns from one head's keys to the next head's.
        mask: A `plain_mask` `[B or 1, 1, F, S]`, or None for causal, or everything if there is one position.
        scale: Of the scores.
        places: Addresses of queries, keys, values and output.
        jobs: From `jobs_apart`, for rows with regions of their own; the batch is one, and there is no mask.
    """
    *inputs, out = places
    if jobs is not None:
        most, longest = jobs[:, 1].max(), jobs[0, 3]
        changed = (*sizes[:4], int(most), sizes[5])
        table = address(jobs, "parts of attention")
        return (*changed, pitch, APART, len(jobs), int(longest), number_bits(scale), *inputs, table, out)
    kind, rows, mask_pitch, place = (NO_MASK if sizes[3] == 1 else CAUSAL), 1, 0, 0
    if mask is not None:
        kind = ALLOWED if mask.dtype is torch.bool else ADDED
        rows, mask_pitch, place = mask.shape[0], mask.shape[3], address(mask, "numbers of the mask")
    return (*sizes, pitch, kind, rows, mask_pitch, number_bits(scale), *inputs, place, out)


def _check(queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> None:
    """See `attend`.

    Raises:
        RuntimeError: The shapes, dtypes or layouts do not fit each other.
    """
    (batch, heads, fed, size), (_, shared, seen, _) = queries.shape, keys.shape
    alike = keys.dtype is queries.dtype is values.dtype and keys.stride() == values.stride() and readable(keys)
    if keys.shape != (batch, shared, seen, size) or values.shape != keys.shape or heads % shared or not alike:
        raise RuntimeError(
            f"Attention of {queries.dtype} queries {tuple(queries.shape)} was given {keys.dtype} keys "
            f"{tuple(keys.shape)} and {values.dtype} values {tuple(values.shape)}."
        )
    if mask is not None and (mask.shape[1:] != (1, fed, seen) or mask.shape[0] not in (1, batch)):
        raise RuntimeError(f"A mask for {fed} positions of {seen} columns was given as {tuple(mask.shape)}.")


def attend(queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """Attention as torch's `scaled_dot_product_attention` computes it, causal where there is no mask.

    Args:
        queries: `[B, heads, F, D]`, contiguous.
        keys, values: `[B, shared, S, D]`, heads a multiple of shared; `readable`, of one layout.
        mask: `[B or 1, 1, F, S]`, bool (True: seen) or added to the scores; None for causal, or everything if F is 1.
        scale: Of the scores.

    Returns:
        `[B, F, heads D]`; zeros where everything is hidden.

    Raises:
        RuntimeError: The shapes do not fit each other, or something has lost its memory.
        MemoryError: There is no memory to work in.
    """
    batch, heads, fed, size = queries.shape
    shared, seen = keys.shape[1], keys.shape[2]
    mask = None if mask is None else plain_mask(mask)
    _check(queries, keys, values, mask)
    out = queries.new_empty(batch, fed, heads * size)
    last = (batch * shared - 1) * keys.stride(1) + seen * size
    held = address(keys, "keys", last), address(values, "values", last)
    places = (address(queries, "queries"), *held, out.data_ptr())
    numbers = attend_numbers((batch, heads, shared, fed, seen, size), keys.stride(1) // size, mask, scale, places)
    run("compiled::scaled_dot_product", _function(queries.dtype), *numbers)
    return out
