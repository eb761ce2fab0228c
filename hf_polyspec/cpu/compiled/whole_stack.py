# SPDX-License-Identifier: Apache-2.0
"""Decoder blocks one after another as one task, whose numbers are kept from pass to pass.

Most of what a block's task says is the same in every pass of so many positions: sizes, the weights' addresses, the
memory in between. Only a few columns of the table of all blocks change, and those are written for all blocks at once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any
from weakref import ref

import numpy as np
from torch import Tensor

from hf_polyspec.host.rooms import Rooms

from .attention import APART, attend_numbers
from .places import address
from .shares import COUNTERS, ROOM, Shares
from .tasks import HEADER, check_counter, staged
from .whole_block import SLOT, Apart, BlockProducts, BlockShape, block_stages, run_blocks, scratch_size

Room = tuple[Tensor, Tensor, int]
"""Buffers of keys and values `[B, shared, capacity, D]`, contiguous, and the columns filled already."""


def _column(stage: int, number: int) -> int:
    return HEADER + SLOT * stage + number


# Where in a block's task stands what changes from pass to pass, see the tasks of the stages.
_INPUT = [_column(0, 4), _column(5, 4)]
_OUTPUT = _column(9, 5)
_TURNS = [_column(2, 6), _column(2, 8), _column(2, 9)]
_COLUMNS = _column(2, 14)
_NEW = np.array([_column(2, 11), _column(2, 12)])
_HELD = [_column(3, 13), _column(3, 14)]
_PITCH = [_column(2, 13), _column(3, 7)]
_MASK = [_column(3, 5), _column(3, 8), _column(3, 9), _column(3, 10), _column(3, 15)]
_PRODUCTS = (1, 4, 6, 8)
_ALIKE = np.array([*_TURNS, _COLUMNS, *_MASK])  # the same in all blocks


class StackTask:
    """The blocks of a stack for inputs of one shape.

    It holds the memory that the blocks write to, so it is one thread's own, and what it gives lasts until it is run
    again.

    Args:
        x: `[B, F, H]`, contiguous.
        blocks: Matrices, and what else each block is.
        turns, mask: As for `whole_block`.
        rooms: Each block's keys and values.
        like: A task of the same blocks for inputs of another shape, in the same dtype, where there is one.
        last: Whether the last block's output is all that will be looked at: two are written in turns then.

    Attributes:
        busy: whether what it gives is still to be read, and nobody may run it.
    """

    def __init__(
        self,
        x: Tensor,
        blocks: Sequence[tuple[BlockProducts, BlockShape]],
        turns: tuple[Tensor, Tensor],
        mask: Tensor | None,
        rooms: Sequence[Room],
        like: StackTask | None = None,
        *,
        last: bool = False,
    ) -> None:
        scratch = x.new_empty(max(scratch_size(x, *block) for block in blocks))
        made = x.new_empty(2 if last else len(blocks), *x.shape).unbind()
        self.outputs = [made[place % len(made)] for place in range(len(blocks))]
        self.scratch = scratch
        self._kept = blocks
        self._kinds = blocks[0][0].joint.dtype, x.dtype
        self._shape, self._column_size = blocks[0][1], blocks[0][1].size * x.element_size()
        parts = zip([x, *self.outputs[:-1]], self.outputs, blocks, rooms, strict=True)
        if like is None or like._kept is not blocks or like._kinds != self._kinds or not _alike(blocks):
            like = None
        tasks = [
            staged(block_stages(given, out, scratch, *block, turns, mask, room), SLOT)
            for given, out, block, room in islice(parts, None if like is None else 1)
        ]
        self._table = np.array(tasks, np.int64)  # counters and gates are 0 in this one
        if like is not None:
            # Blocks of one shape differ in where their matrices, inputs and outputs lie, whatever the shape of those.
            self._table = np.repeat(self._table, len(blocks), axis=0)
            own = (like._table != like._table[0]).any(0)
            self._table[:, own] = like._table[:, own]
            places = [one.data_ptr() for one in (x, *self.outputs)]
            self._table[:, _INPUT] = np.array(places[:-1])[:, None]
            self._table[:, _OUTPUT] = places[1:]
        self._task = np.empty_like(self._table)
        self._shares = Shares(len(blocks) * len(_PRODUCTS))
        self._table[:, [_column(stage, ROOM) for stage in _PRODUCTS]] = self._shares.room
        counters = self._shares.addresses().reshape(len(blocks), -1)
        self._table[:, [_column(stage, COUNTERS) for stage in _PRODUCTS]] = counters
        self.busy = False
        self._rooms: ref[Any] | None = None
        self._held = np.zeros((len(blocks), 2), np.int64)

    def run(
        self,
        x: Tensor,
        turns: tuple[Tensor, Tensor],
        mask: Tensor | None,
        rooms: Sequence[Room],
        apart: Apart | None = None,
    ) -> None:
        """Compute all blocks; the arguments are of the shapes that the task was made for, but for masks and rooms.

        Args:
            x, turns, mask, rooms: As when it was made.
            apart: As for `whole_block`.

        Raises:
            RuntimeError: Something has lost its memory.
            MemoryError: There is no memory to work in.
        """
        task, fed = self._task, x.shape[1]
        start = rooms.start if type(rooms) is Rooms else rooms[0][2]
        cos, sin = turns
        if self._rooms is None or self._rooms() is not rooms:
            self._settle(rooms)
        task[:] = self._table
        self._shares.clear()
        task[0, _INPUT] = address(x, "hidden states")
        task[:, _NEW] = self._held + start * self._column_size
        task[:, _ALIKE] = (
            *(cos.shape[0], address(cos, "cosines"), address(sin, "sines")),
            0 if apart is None else address(apart.columns, "columns to write to"),
            *self._mask(x, mask, start + fed, apart),
        )
        run_blocks(*self._kinds, len(task), task.strides[0], task.ctypes.data)
        check_counter(task[:, HEADER::SLOT].max())

    @contextmanager
    def under_way(self) -> Iterator[None]:
        """What the task gives is still to be read: meanwhile it is `busy`."""
        self.busy = True
        try:
            yield
        finally:
            self.busy = False

    def go_on(self, x: int, turns: tuple[int, int], jobs: Any, rooms: Rooms, columns: int = 0) -> None:
        """`run` for one row, or rows apart, over a cache of ours, from addresses that need no look.

        Args:
            x: Where the inputs lie; turns: cosines and sines `[F, D]`.
            jobs: Parts of attention `[n, 4]`, int64, as `jobs_apart` gives them.
            rooms: As for `run`.
            columns: `[F]`, int64, where new keys and values go; 0: behind the `rooms.start` that there are.

        Raises:
            MemoryError: There is no memory to work in.
        """
        task = self._task
        if self._rooms is None or self._rooms() is not rooms:
            self._settle(rooms)
        task[:] = self._table
        self._shares.clear()
        task[0, _INPUT] = x
        task[:, _NEW] = self._held + rooms.start * self._column_size
        parts = jobs[:, 1].max(), APART, len(jobs), jobs[0, 3], jobs.ctypes.data
        task[:, _ALIKE] = (1, *turns, columns, *parts)
        run_blocks(*self._kinds, len(task), task.strides[0], task.ctypes.data)
        check_counter(task[:, HEADER::SLOT].max())

    def _settle(self, rooms: Sequence[Room]) -> None:
        """Write down where keys and values are; once for those of a cache that keeps them there."""
        held = np.array(
            [(address(keys, "keys"), address(values, "values"), keys.shape[2]) for keys, values, _ in rooms], np.int64
        )
        self._held = self._table[:, _HELD] = held[:, :2]
        self._table[:, _PITCH] = held[:, 2:]
        self._rooms = ref(rooms) if type(rooms) is Rooms else None

    def _mask(self, x: Tensor, mask: Tensor | None, seen: int, apart: Apart | None) -> tuple[int, ...]:
        """The numbers of attention's task that tell what is seen."""
        shape = self._shape
        sizes = (x.shape[0], shape.heads, shape.shared, x.shape[1], seen, shape.size)
        jobs = None if apart is None else apart.jobs
        numbers = (0, *attend_numbers(sizes, 0, mask, shape.scale, (0, 0, 0, 0), jobs))
        return tuple(numbers[column - _column(3, 0)] for column in _MASK)


def _alike(blocks: Sequence[tuple[BlockProducts, BlockShape]]) -> bool:
    """Whether all blocks are of one shape."""
    shapes = {
        (
            *(one.shape for one in (made.joint, made.output, made.gates, made.down)),
            shape.heads,
            shape.shared,
            shape.size,
        )
        for made, shape in blocks
    }
    return len(shapes) == 1


_ROWS_TO_NORM = _column(0, 1)


class PairTask(StackTask):
    """One block that reads more than its own stream, as that of an EAGLE-3 head does: an embedding beside it.

    Its first norm is not computed: what its queries, keys and values are made of is written to `read` before each run.

    Args:
        x: `[B, F, H]`, the stream, contiguous; at most `blocks.FEW` positions.
        products, shape: of the block.
        turns, mask, room: As for `whole_block`.

    Attributes:
        read: `[B, F, K]`, where K are the inputs of the block's first product.
    """

    def __init__(
        self,
        x: Tensor,
        products: BlockProducts,
        shape: BlockShape,
        turns: tuple[Tensor, Tensor],
        mask: Tensor | None,
        room: Room,
    ) -> None:
        super().__init__(x, [(products, shape)], turns, mask, [room])
        width, rows = products.joint.shape[1], x.shape[0] * x.shape[1]
        self.read = self.scratch[: rows * width].view(*x.shape[:2], width)
        self._table[:, _ROWS_TO_NORM] = 0
