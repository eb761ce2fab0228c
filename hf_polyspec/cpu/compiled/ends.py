# SPDX-License-Identifier: Apache-2.0
"""What follows a model's blocks as one task: the last norm, the matrix that makes logits, and the likeliest ids.

Of a row of logits two numbers are wanted, as long as nobody asks for more: which is the largest, and by how much.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import torch
from numba import carray, njit
from torch import Tensor

from .blocks import norm_numbers, normalize_task
from .numbers import LIKE, VERSION, widen
from .product import Product
from .row_vectors import largest
from .shares import COUNTERS, ROOM, Shares
from .tasks import (
    HEADER,
    Launch,
    check_counter,
    compiled,
    enter,
    leave,
    member,
    number,
    number_bits,
    pointer,
    staged,
    take,
    team,
    together,
)
from .vectors import LANES
from .whole_block import SLOT, multiply

CHUNK = 32 * LANES
"""Logits whose largest is kept while a row is looked through: where it stands is looked for in one of them."""

SLACK = {torch.float32: 2.0**-13, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}
"""How near to the likeliest, as a share of its logit, an id is that may come first where a norm's sum is rounded
otherwise: in 16 bits one step from number to number, in float32 what one input of a matrix of integers is rounded by.
"""


@njit
def _first_two(x: Any, like: Any) -> Any:
    """Where the largest of a row is, of equal ones the first, and by how much; -1 where that cannot be told from
    numbers that are not finite."""
    best = second = np.float32(-np.inf)
    chunk = 0
    whole = x.size // LANES * LANES
    for begin in range(0, x.size, CHUNK):
        count = min(CHUNK, whole - begin)
        top = largest(x.ctypes.data + begin * x.itemsize, count, like) if count > 0 else np.float32(-np.inf)
        for k in range(begin + max(count, 0), min(x.size, begin + CHUNK)):
            value = widen(x[k])
            top = value if value > top else top if value == value else np.float32(np.inf)
        if top > best:
            second, best, chunk = best, top, begin
        elif top > second:
            second = top
    if not np.isfinite(best):
        return np.int64(-1), np.float32(0)
    place = chunk
    while widen(x[place]) != best:
        place += 1
    for k in range(chunk, min(x.size, chunk + CHUNK)):
        value = widen(x[k])
        if k != place and value > second:
            second = value
    return np.int64(place), best - second


@njit
def _pick_task(task: Any, like: Any) -> None:
    """The likeliest of the first `known` ids of each row, its lead, and whether that is within rounding."""
    numbers, slack = carray(pointer(task, np.int64(0)), 8), number(task, 8)
    rows, outputs, known = numbers[1], numbers[2], numbers[3]
    logits = carray(pointer(numbers[4], like), (rows, outputs))
    ids = carray(pointer(numbers[5], np.int64(0)), rows)
    leads = carray(pointer(numbers[6], np.float32(0)), rows)
    close = carray(pointer(numbers[7], np.int64(0)), rows)
    while True:
        row = take(task)
        if row >= rows:
            return
        place, lead = _first_two(logits[row, :known], like)
        ids[row], leads[row] = place, lead
        close[row] = place >= 0 and lead <= slack * abs(widen(logits[row, max(place, 0)]))


def _task(stored: Any, active: Any) -> Callable[[Any], None]:
    version = VERSION

    def task(place: Any) -> None:
        if version >= 0:  # always, see there
            threads, me = team(place), member(place)
            if enter(place, 0, threads):
                normalize_task(place + 8 * HEADER, active)
                leave(place, 0)
            multiply(place + 8 * (HEADER + SLOT), stored, active, me, threads)
            if enter(place, 1, threads):
                leave(place, 1)
            _pick_task(place + 8 * (HEADER + 2 * SLOT), active)

    return task


@cache
def _function(stored: torch.dtype, active: torch.dtype) -> Launch:
    return together(compiled(_task(LIKE[stored], LIKE[active])))


class EndTask:
    """The end of passes over so many positions. What it gives lasts until it is run again.

    Args:
        states: `[1, F, H]`, what the last block writes.
        norm: weight `[H]` and epsilon of the last norm.
        product: the matrix `[V, H]` that makes logits.
        known: ids that are looked at, the first ones, at most V.

    Attributes:
        ids, leads: `[F]`, the likeliest id behind each position, and by how much; -1 where that cannot be told.
        close: `[F]`, whether that is so little that another order of sums might tell another id.
        normed: `[F, H]`, what is multiplied by the matrix; logits: `[F, V]`.
    """

    def __init__(self, states: Tensor, norm: tuple[Tensor, float], product: Product, known: int) -> None:
        rows, width = states.shape[1], states.shape[2]
        self.ids, self.leads, self.close = (
            np.zeros(rows, np.int64),
            np.zeros(rows, np.float32),
            np.zeros(rows, np.int64),
        )
        given = (self.ids.ctypes.data, self.leads.ctypes.data, self.close.ctypes.data)
        self.logits, self.normed = states.new_empty(rows, product.shape[0]), states.new_empty(rows, width)
        normed, logits = self.normed.data_ptr(), self.logits.data_ptr()
        self._kept = states, norm[0], norm[0].untyped_storage(), product
        self._kinds = product.dtype, states.dtype
        stages = (
            norm_numbers(rows, *norm, states.data_ptr(), normed),
            product.task(rows, normed, logits),
            (rows, product.shape[0], known, logits, *given, number_bits(SLACK[states.dtype])),
        )
        self._table = np.array(staged(stages, SLOT), np.int64)
        self._task, self._shares = np.empty_like(self._table), Shares(1)
        at = HEADER + SLOT
        self._table[at + ROOM], self._table[at + COUNTERS] = self._shares.room, self._shares.addresses()[0]

    def run(self) -> None:
        """Compute `ids`, `leads` and `close`.

        Raises:
            MemoryError: There is no memory to work in.
        """
        self._task[:] = self._table
        self._shares.clear()
        _function(*self._kinds)(self._task.ctypes.data)
        check_counter(self._task[HEADER::SLOT].max())
