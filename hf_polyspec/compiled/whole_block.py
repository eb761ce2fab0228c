# SPDX-License-Identifier: Apache-2.0
"""A whole decoder block as one task: ten stages, with gates where every thread must have finished the one before.

Between the products one thread does the small steps while the others wait; that takes microseconds, where a call from
Python for each step takes tens of them.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from numba import carray, njit
from torch import Tensor

from .attention import ADDED, ALLOWED, CAUSAL, NO_MASK, attend_task
from .blocks import gate_task, normalize_task, rotate_task
from .numbers import FLOATS, LIKE, VERSION, narrow, widen
from .product import CompiledProduct, multiply_task
from .tasks import HEADER, compiled, enter, leave, number_bits, pointer, run_stages, team

_SLOT = 18
"""Numbers of a stage."""


@njit(fastmath=FLOATS)
def _add_task(task: Any, like: Any) -> None:
    numbers = carray(pointer(task, np.int64(0)), 5)
    x, update = carray(pointer(numbers[2], like), numbers[1]), carray(pointer(numbers[3], like), numbers[1])
    y = carray(pointer(numbers[4], like), numbers[1])
    for k in range(numbers[1]):
        y[k] = narrow(widen(x[k]) + widen(update[k]), like)


@njit
def _stage(task: Any, index: Any) -> Any:
    return task + 8 * (HEADER + _SLOT * index)


@njit
def _block(task: Any, stored: Any, like: Any) -> None:
    threads = team(task)
    if enter(task, 0, threads):
        normalize_task(_stage(task, 0), like)
        leave(task, 0)
    multiply_task(_stage(task, 1), stored, like)
    if enter(task, 1, threads):
        rotate_task(_stage(task, 2), like)
        leave(task, 1)
    attend_task(_stage(task, 3), like)
    if enter(task, 2, threads):
        leave(task, 2)
    multiply_task(_stage(task, 4), stored, like)
    if enter(task, 3, threads):
        normalize_task(_stage(task, 5), like)
        leave(task, 3)
    multiply_task(_stage(task, 6), stored, like)
    if enter(task, 4, threads):
        gate_task(_stage(task, 7), like)
        leave(task, 4)
    multiply_task(_stage(task, 8), stored, like)
    if enter(task, 5, threads):
        _add_task(_stage(task, 9), like)
        leave(task, 5)


def _task(stored: Any, active: Any) -> Callable[[Any], None]:
    def task(numbers: Any) -> None:
        if VERSION >= 0:  # always, see there
            _block(numbers, stored, active)

    return task


@cache
def _function(stored: torch.dtype, active: torch.dtype) -> int:
    return compiled(_task(LIKE[stored], LIKE[active]))


@dataclass(frozen=True)
class BlockProducts:
    """The matrices of one block: query, key and value side by side, output, gate beside up, down."""

    joint: CompiledProduct
    output: CompiledProduct
    gates: CompiledProduct
    down: CompiledProduct

    @property
    def stored(self) -> torch.dtype | None:
        """What all of them are stored as, None where they differ."""
        kinds = {product.dtype for product in (self.joint, self.output, self.gates, self.down)}
        return kinds.pop() if len(kinds) == 1 else None


@dataclass(frozen=True)
class BlockShape:
    """What a block is besides its matrices.

    Attributes:
        heads, shared: heads of queries, and of keys and values; size: numbers of a head.
        scale: of the scores.
        norms: weight `[H]` and epsilon of the norms before attention and before the gates.
    """

    heads: int
    shared: int
    size: int
    scale: float
    norms: tuple[tuple[Tensor, float], tuple[Tensor, float]]


def whole_block(
    x: Tensor,
    products: BlockProducts,
    shape: BlockShape,
    turns: tuple[Tensor, Tensor],
    mask: Tensor | None,
    cache: tuple[Tensor, Tensor, int],
) -> Tensor:
    """One decoder block of Llama's kind.

    Args:
        x: `[B, F, H]`, contiguous.
        products: of one stored dtype, which is int8 or x's.
        turns: cosines and sines `[B or 1, F, D]`, contiguous, in x's dtype.
        mask: `[B or 1, 1, F, S]`, contiguous, bool or float32; None for causal, or everything if F is 1.
        cache: buffers of keys and values `[B, shared, capacity, D]`, contiguous, and the columns filled already;
            the new ones are written there.

    Returns:
        `[B, F, H]`.
    """
    batch, fed, width = x.shape
    rows, each = batch * fed, x.element_size()
    keys, values, start = cache
    queries_width, joint_width = shape.heads * shape.size, products.joint.shape[0]
    gates_width = products.gates.shape[0]
    # One piece of memory for everything in between; of the norms' outputs and the updates one lives at a time.
    widths = (width, joint_width, queries_width, queries_width, width, width, gates_width, gates_width // 2)
    scratch = x.new_empty(rows * sum(widths))
    places, place = [], scratch.data_ptr()
    for one in widths:
        places.append(place)
        place += rows * one * each
    normed, joint, queries, seen, update, total, gates, opened = places
    out = torch.empty_like(x)
    (first, first_epsilon), (second, second_epsilon) = shape.norms
    capacity, columns = keys.shape[2], start + fed
    offset = start * shape.size * each
    cos, sin = turns
    kind, mask_rows, mask_pitch = (NO_MASK if fed == 1 else CAUSAL), 1, 0
    if mask is not None:
        kind, mask_rows, mask_pitch = (ALLOWED if mask.dtype is torch.bool else ADDED), mask.shape[0], mask.shape[3]
    heads = (shape.heads, shape.shared)
    stages: Sequence[tuple[int, ...]] = (
        (rows, width, number_bits(first_epsilon), x.data_ptr(), 0, first.data_ptr(), normed, 0),
        products.joint.task(rows, normed, joint),
        (
            *(batch, fed, *heads, shape.size, cos.shape[0], joint, cos.data_ptr(), sin.data_ptr(), queries),
            *(keys.data_ptr() + offset, values.data_ptr() + offset, capacity),
        ),
        (
            *(batch, *heads, fed, columns, shape.size, capacity, kind, mask_rows, mask_pitch, number_bits(shape.scale)),
            *(queries, keys.data_ptr(), values.data_ptr(), 0 if mask is None else mask.data_ptr(), seen),
        ),
        products.output.task(rows, seen, update),
        (rows, width, number_bits(second_epsilon), x.data_ptr(), update, second.data_ptr(), normed, total),
        products.gates.task(rows, normed, gates),
        (rows, gates_width // 2, gates, opened),
        products.down.task(rows, opened, update),
        (rows * width, total, update, out.data_ptr()),
    )
    task = (ctypes.c_int64 * (HEADER + _SLOT * len(stages)))()
    for index, numbers in enumerate(stages):
        begin = HEADER + _SLOT * index + 1
        task[begin : begin + len(numbers)] = list(numbers)
    run_stages(_function(products.joint.dtype, x.dtype), task)
    return out
