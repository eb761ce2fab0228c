# SPDX-License-Identifier: Apache-2.0
"""Whole decoder blocks as one task: ten stages each, with gates where every thread must have finished the one before.

Between the products one thread does the small steps while the others wait, or all do with many rows; that takes
microseconds, where a call from Python for each step takes tens of them.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from numba import carray, njit, types
from numba.extending import overload
from torch import Tensor

from .attention import attend_numbers, attend_task
from .blocks import FEW, add_task, gate_task, norm_numbers, normalize_task, rotate_numbers, rotate_task
from .groups import multiply_codes_task
from .numbers import LIKE, VERSION
from .places import address
from .product import Product, multiply_task
from .tasks import HEADER, Launch, check_counter, compiled, enter, leave, member, pointer, staged, team, together

SLOT = 18
"""Numbers of a stage."""


def multiply(task: Any, stored: Any, like: Any, me: Any, threads: Any) -> None:
    """One thread's part of the product for what the matrices are stored as."""
    raise NotImplementedError


@overload(multiply, strict=False)
def _multiply_stored(task: Any, stored: Any, like: Any, me: Any, threads: Any) -> Any:
    if stored == types.uint8:
        return lambda task, stored, like, me, threads: multiply_codes_task(task, like, me, threads)
    return lambda task, stored, like, me, threads: multiply_task(task, stored, like, me, threads)


@njit
def _stage(task: Any, index: Any) -> Any:
    return task + 8 * (HEADER + SLOT * index)


@njit
def _begin(task: Any, gate: Any, threads: Any, many: Any) -> Any:
    """Wait until all threads are here; whether this one is to do the small step that follows, or part of it."""
    first = enter(task, gate, threads)
    if first and many:
        leave(task, gate)
    return first or many


@njit
def _end(task: Any, gate: Any, threads: Any, many: Any) -> None:
    """After a small step: let the others go on, or wait until they have done their parts of it."""
    if not many:
        leave(task, gate)
    elif enter(task, gate + 1, threads):
        leave(task, gate + 1)


@njit
def _block(task: Any, stored: Any, like: Any) -> None:
    threads, me = team(task), member(task)
    many = carray(pointer(_stage(task, 0), np.int64(0)), 2)[1] > FEW
    if _begin(task, 0, threads, many):
        normalize_task(_stage(task, 0), like)
        _end(task, 0, threads, many)
    multiply(_stage(task, 1), stored, like, me, threads)
    if _begin(task, 2, threads, many):
        rotate_task(_stage(task, 2), like)
        _end(task, 2, threads, many)
    attend_task(_stage(task, 3), like)
    if enter(task, 4, threads):
        leave(task, 4)
    multiply(_stage(task, 4), stored, like, me, threads)
    if _begin(task, 5, threads, many):
        normalize_task(_stage(task, 5), like)
        _end(task, 5, threads, many)
    multiply(_stage(task, 6), stored, like, me, threads)
    if _begin(task, 7, threads, many):
        gate_task(_stage(task, 7), like)
        _end(task, 7, threads, many)
    multiply(_stage(task, 8), stored, like, me, threads)
    if _begin(task, 9, threads, many):
        add_task(_stage(task, 9), like)
        _end(task, 9, threads, many)


def _task(stored: Any, active: Any) -> Callable[[Any], None]:
    version = VERSION

    def task(place: Any) -> None:
        if version >= 0:  # always, see there
            numbers = carray(pointer(place, np.int64(0)), 3)
            for block in range(numbers[0]):  # nobody is past a block's last gate before everybody is there
                _block(numbers[2] + numbers[1] * block, stored, active)

    return task


@cache
def _function(stored: torch.dtype, active: torch.dtype) -> Launch:
    return together(compiled(_task(LIKE[stored], LIKE[active])))


def run_blocks(stored: torch.dtype, active: torch.dtype, count: int, pitch: int, first: int) -> None:
    """Do the tasks of blocks one after another, as one task.

    Args:
        stored: What the matrices are stored as; active: dtype of the activations.
        count: Of blocks; pitch: bytes from one block's task to the next one's; first: address of the first.
    """
    task = array("q", (count, pitch, first))
    _function(stored, active)(task.buffer_info()[0])


@dataclass(frozen=True)
class BlockProducts:
    """The matrices of one block: query, key and value side by side, output, gate beside up, down."""

    joint: Product
    output: Product
    gates: Product
    down: Product

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


@dataclass(frozen=True)
class Apart:
    """Where a pass `[1, N]` over rows with regions of their own reads and writes.

    Attributes:
        jobs: From `jobs_apart`; columns: `[N]` int64, where each position's keys and values go.
    """

    jobs: Tensor
    columns: Tensor


def whole_block(
    x: Tensor,
    products: BlockProducts,
    shape: BlockShape,
    turns: tuple[Tensor, Tensor],
    mask: Tensor | None,
    cache: tuple[Tensor, Tensor, int],
    apart: Apart | None = None,
) -> Tensor:
    """One decoder block of Llama's kind.

    Args:
        x: `[B, F, H]`, contiguous.
        products: of one stored dtype, which is an 8-bit one or x's.
        turns: cosines and sines `[B or 1, F, D]`, contiguous, in x's dtype.
        mask: `[B or 1, 1, F, S]`, see `plain_mask`; None for causal, or everything if F is 1.
        cache: buffers of keys and values `[B, shared, capacity, D]`, contiguous, and the columns filled already;
            the new ones are written there.
        apart: For rows with regions of their own: then B is 1, there is no mask, and no column counts as filled.

    Returns:
        `[B, F, H]`.

    Raises:
        RuntimeError: Something has lost its memory.
        MemoryError: There is no memory to work in.
    """
    scratch = x.new_empty(scratch_size(x, products, shape))
    out = torch.empty_like(x)
    task = staged(block_stages(x, out, scratch, products, shape, turns, mask, cache, apart), SLOT)
    run_blocks(products.joint.dtype, x.dtype, 1, 8 * len(task), task.buffer_info()[0])
    check_counter(max(task[HEADER::SLOT]))
    return out


def _widths(products: BlockProducts, shape: BlockShape, width: int) -> tuple[int, ...]:
    """Numbers a row of everything in between; of the norms' outputs and the updates one lives at a time."""
    queries, (joint, read), gates = shape.heads * shape.size, products.joint.shape, products.gates.shape[0]
    return (read, joint, queries, queries, width, width, gates, gates // 2)


def scratch_size(x: Tensor, products: BlockProducts, shape: BlockShape) -> int:
    """Numbers like those of `x` `[B, F, H]` that a block needs between its input and its output."""
    return x.shape[0] * x.shape[1] * sum(_widths(products, shape, x.shape[2]))


def block_stages(
    x: Tensor,
    out: Tensor,
    scratch: Tensor,
    products: BlockProducts,
    shape: BlockShape,
    turns: tuple[Tensor, Tensor],
    mask: Tensor | None,
    cache: tuple[Tensor, Tensor, int],
    apart: Apart | None = None,
) -> Sequence[tuple[int, ...]]:
    """The numbers of a block's stages, for `staged`.

    Args:
        x: `[B, F, H]`; out: of its shape; scratch: `scratch_size` of its numbers, whatever they are.
        products, shape, turns, mask, cache, apart: As for `whole_block`.
    """
    batch, fed, width = x.shape
    rows, each = batch * fed, x.element_size()
    keys, values, start = cache
    given, held_keys, held_values = address(x, "hidden states"), address(keys, "keys"), address(values, "values")
    ends = accumulate(_widths(products, shape, width), initial=0)
    normed, joint, queries, seen, update, total, gates, opened, _ = (
        scratch.data_ptr() + rows * end * each for end in ends
    )
    first, second = shape.norms
    capacity, heads = keys.shape[2], (shape.heads, shape.shared)
    offset = start * shape.size * each
    written = (queries, held_keys + offset, held_values + offset)
    read = (queries, held_keys, held_values, seen)
    sizes = (batch, *heads, fed, start + fed, shape.size)
    columns = 0 if apart is None else address(apart.columns, "columns to write to")
    return (
        norm_numbers(rows, *first, given, normed),
        products.joint.task(rows, normed, joint),
        rotate_numbers((batch, fed, *heads), turns, joint, written, capacity, columns),
        attend_numbers(sizes, capacity, mask, shape.scale, read, None if apart is None else apart.jobs),
        products.output.task(rows, seen, update),
        norm_numbers(rows, *second, given, normed, update, total),
        products.gates.task(rows, normed, gates),
        (rows, products.gates.shape[0] // 2, gates, opened),
        products.down.task(rows, opened, update),
        (rows, width, total, update, out.data_ptr()),
    )
