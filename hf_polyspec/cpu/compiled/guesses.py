# SPDX-License-Identifier: Apache-2.0
"""What a drafter's scores come to, as one task: some of them raised, and the likeliest found.

torch reads a few thousand scores in microseconds and needs ten calls for it, each of which takes as long.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import numpy as np
import torch
from numba import carray, njit
from torch import Tensor

from .numbers import LIKE, VERSION, widen
from .places import address
from .row_vectors import largest, powers
from .tasks import (
    Launch,
    alone,
    borrow,
    compiled,
    pointer,
    release,
    run,
    take,
    together,
    whole_lines,
)
from .vectors import LANES

SEVERAL = 4
"""Nodes from which on more threads than one are called."""

Raised = tuple[Sequence[int], Sequence[int], Sequence[float]]
"""Nodes in order, columns and shares: what is added to probabilities, relative to the whole of the node's law."""


@njit
def _whole_law(scores: Any, powered: Any) -> Any:
    """The log of the sum of the exponentials of a node's scores; `powered` is room for as many."""
    top = largest(scores.ctypes.data, scores.size, np.float32(0))
    if not np.isfinite(top):
        return top
    powered[:] = scores
    return top + np.log(powers(powered.ctypes.data, scores.size, top))


@njit
def _add(first: Any, second: Any) -> Any:
    """log(e^first + e^second)."""
    top = max(first, second)
    if not np.isfinite(top):
        return top
    return top + np.log1p(np.exp(min(first, second) - top))


@njit
def _keep_likeliest(scores: Any, width: Any, values: Any, columns: Any) -> None:
    """The largest scores and their columns, in order; of equal ones the first column's comes first."""
    count, held = values.size, 0
    values[:] = -np.inf
    columns[:] = 0
    least = np.float32(-np.inf)
    for c in range(width):
        if scores[c] > least:
            at = min(held, count - 1)
            while at > 0 and values[at - 1] < scores[c]:
                values[at], columns[at] = values[at - 1], columns[at - 1]
                at -= 1
            values[at], columns[at] = scores[c], c
            held = min(held + 1, count)
            if held == count:
                least = values[count - 1]


@njit
def guess_task(task: Any, like: Any) -> None:
    """Scores `[n, N1]` and `[n, N2]` side by side in float32, some raised, and the likeliest of each node."""
    numbers = carray(pointer(task, np.int64(0)), 14)
    nodes, first, second, pitch, raised, count = (
        numbers[1],
        numbers[2],
        numbers[3],
        numbers[4],
        numbers[7],
        numbers[12],
    )
    left = carray(pointer(numbers[5], like), (nodes, first))
    right = carray(pointer(numbers[6], like), (nodes if second else 0, second))
    which = carray(pointer(numbers[8], np.int64(0)), (2, raised))
    shares = carray(pointer(numbers[9], np.float64(0)), raised)
    out = carray(pointer(numbers[10], np.float32(0)), (nodes, pitch))
    best = carray(pointer(numbers[11], np.float32(0)), (nodes if count else 0, count))
    found = carray(pointer(numbers[13], np.int64(0)), (nodes if count else 0, count))
    memory = borrow(task, whole_lines(pitch * 4))
    if memory == 0:
        return
    powered = carray(pointer(memory, np.float32(0)), pitch)
    while True:
        i = take(task)
        if i >= nodes:
            release(memory)
            return
        scores = out[i]
        for c in range(first):
            scores[c] = widen(left[i, c])
        for c in range(second):
            scores[first + c] = widen(right[i, c])
        scores[first + second :] = -np.inf
        lifted, more = False, 0.0
        for r in range(raised):
            lifted = lifted or which[0, r] == i
        whole = _whole_law(scores, powered) if lifted or count > 1 else np.float32(0)
        if lifted:
            for r in range(raised):
                if which[0, r] == i:
                    c = which[1, r]
                    scores[c] = _add(scores[c], np.float32(whole + np.log(shares[r])))
                    more += shares[r]
        if count:
            _keep_likeliest(scores, first + second, best[i], found[i])
            if count > 1:
                whole += np.log1p(more)
                for c in range(count):  # rounding makes nothing likelier than sure
                    best[i, c] = min(best[i, c] - np.float32(whole), np.float32(0))


def _task(like: Any) -> Callable[[Any], None]:
    version = VERSION

    def task(numbers: Any) -> None:
        if version >= 0:  # always, see there
            guess_task(numbers, like)

    return task


@cache
def _function(dtype: torch.dtype, many: bool) -> Launch:
    return (together if many else alone)(compiled(_task(LIKE[dtype])))


def guessing(dtype: torch.dtype, nodes: int) -> Launch:
    """What does the task of so many nodes."""
    return _function(dtype, nodes >= SEVERAL)


def guesses(pieces: Sequence[Tensor], raised: Raised, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Scores with some of them raised, and the likeliest.

    Args:
        pieces: One or two of `[B, n, N]` of one dtype, contiguous: scores of the columns side by side.
        raised: Nodes of the `B n` by number; columns of one node are distinct.
        count: How many of the likeliest are wanted, 0 for none, at most as many as there are columns.

    Returns:
        Scores `[B, n, N]` in float32; of the likeliest the log-probabilities `[B, n, count]` (their scores where one
        is wanted) and columns.

    Raises:
        RuntimeError: Something has lost its memory.
        MemoryError: There is no memory to work in.
    """
    left, right = pieces[0], pieces[1] if len(pieces) > 1 else None
    (batch, fed, first), second = left.shape, 0 if right is None else right.shape[2]
    width = first + second
    pitch = -(-width // LANES) * LANES
    out = torch.empty(batch, fed, pitch, dtype=torch.float32, device="cpu")
    best = torch.empty(batch, fed, count, dtype=torch.float32, device="cpu")
    found = torch.empty(batch, fed, count, dtype=torch.long, device="cpu")
    nodes, columns, shares = raised
    which, added = array("q", (*nodes, *columns)), array("d", shares)
    given = address(left, "scores"), 0 if right is None else address(right, "scores")
    written = best.data_ptr(), count, found.data_ptr()
    numbers = (batch * fed, first, second, pitch, *given, len(added), which.buffer_info()[0], added.buffer_info()[0])
    run("compiled::guesses", guessing(left.dtype, batch * fed), *numbers, out.data_ptr(), *written)
    return out[..., :width], best, found
