# SPDX-License-Identifier: Apache-2.0
"""What is kept of fused blocks that are computed together: who follows whom, and the task that they are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from threading import Thread, current_thread, local
from typing import TYPE_CHECKING, Any, Protocol
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor

from hf_polyspec.cpu.block_parts import BlockParts
from hf_polyspec.cpu.block_products import block_shape
from hf_polyspec.host.moments import Moment

if TYPE_CHECKING:
    from hf_polyspec.cpu.compiled.whole_block import Apart, BlockProducts, BlockShape
    from hf_polyspec.cpu.compiled.whole_stack import Room, StackTask
    from hf_polyspec.cpu.watch import Watch

Turns = tuple[Tensor, Tensor]
_PATIENCE = 64
_ROWS_KEPT = 1024
"""Rows of all shapes of inputs together for which a thread keeps tasks, with the memory that they write to."""


class Block(Protocol):
    """What is read of a fused block: its parts, who follows it, and what is kept for those that go together."""

    @property
    def parts(self) -> BlockParts:
        """Of its layer."""
        ...

    @property
    def link(self) -> Link:
        """To the block that follows."""
        ...

    @property
    def plans(self) -> dict[int, Plan]:
        """By how many blocks go together."""
        ...


class Link:
    """Which block follows another one.

    After each time that what waited was not asked for, it takes twice as many passes to believe it again.
    """

    def __init__(self) -> None:
        self._next: Callable[[], Block | None] | None = None
        self._patience, self._seen = 1, 0

    def next(self) -> Block | None:
        """The block that follows, None if there is none, or it is not known yet."""
        return None if self._next is None else self._next()

    def meet(self, block: Block) -> None:
        """A block was called with what this link's block gave."""
        if self.next() is not block:
            self._seen += 1
            if self._seen >= self._patience:
                self._next, self._seen = ref(block), 0

    def cut(self, wasted: bool) -> None:
        """The block that follows cannot be computed together with this one, or has been and nobody asked for it."""
        self._next, self._seen = None, 0
        if wasted:
            self._patience = min(2 * self._patience, _PATIENCE)


class Plan:
    """What is kept from pass to pass of blocks that are computed together.

    Args:
        blocks: At least two, all ready.
        products: Their matrices.
        watch: What tells whether all of it still is what it was.
    """

    def __init__(self, blocks: Sequence[Block], products: Sequence[BlockProducts], watch: Watch) -> None:
        self.blocks = list(blocks)
        self.layers = [block.parts.layer for block in blocks]
        self.in_order = [block.parts.attention.layer_idx for block in blocks] == list(range(len(blocks)))
        self._watch = watch
        self._seen: tuple[Moment, torch.dtype] | None = None
        self._matrices: list[tuple[BlockProducts, BlockShape]] = [
            (product, block_shape(block.parts)) for product, block in zip(products, blocks, strict=True)
        ]
        self._own = local()  # a task and its memory belong to one thread
        self._whole: WeakKeyDictionary[Thread, Any] = WeakKeyDictionary()  # likewise

    @property
    def shape(self) -> BlockShape:
        """Of the first block; those that follow fit to it."""
        return self._matrices[0][1]

    @property
    def whole(self) -> Any:
        """What this thread has kept for passes of the whole model from one text to the next (`WholePass`), or None."""
        return self._whole.get(current_thread())

    @whole.setter
    def whole(self, made: Any) -> None:
        for thread, other in list(self._whole.items()):
            if not other.shares_with(made):  # one that rests may never find out, and would keep what was replaced
                self._whole.pop(thread, None)
        self._whole[current_thread()] = made

    def seen(self, x: Tensor, moment: Moment | None) -> bool:
        """Whether all was looked at in this moment already, for inputs like `x`."""
        seen = self._seen
        return moment is not None and seen is not None and seen[0] is moment and seen[1] is x.dtype

    def same(self, x: Tensor, moment: Moment | None = None) -> bool:
        """Whether all of it still is what it was, for inputs like `x`; looked at once a moment, but for where weights
        lie: another thread may have put others in their place."""
        if self.seen(x, moment) and self._watch.in_place():
            return True
        found = self._watch.same(x)
        self._seen = (moment, x.dtype) if found and moment is not None else None
        return found

    def run(
        self,
        x: Tensor,
        turns: Turns,
        mask: Tensor | None,
        rooms: Sequence[Room],
        apart: Apart | None,
        last: bool = False,
    ) -> StackTask:
        """Compute the blocks, see `StackTask`."""
        task = self.task(x, turns, mask, rooms, last)
        task.run(x, turns, mask, rooms, apart)
        return task

    def task(
        self, x: Tensor, turns: Turns, mask: Tensor | None, rooms: Sequence[Room], last: bool = False
    ) -> StackTask:
        """What computes the blocks in this thread for inputs of the shape of `x`.

        Where the last block's output is all that is looked at, it is made for one pass: prompts have all lengths.
        """
        from hf_polyspec.cpu.compiled.whole_stack import StackTask

        tasks: dict[str, StackTask] = self._own.__dict__
        key = f"{tuple(x.shape)} {torch.get_num_threads()}"
        like = next((kept for kept in tasks.values() if kept.outputs[0].dtype is x.dtype), None)
        if last:
            return StackTask(x, self._matrices, turns, mask, rooms, like, last=True)
        task = tasks.pop(key, None)
        if task is not None and task.busy:  # somebody's code begins a pass inside of another
            tasks[key] = task
            return StackTask(x, self._matrices, turns, mask, rooms, like)
        if task is None:
            while tasks and sum(_rows(one) for one in (x, *(kept.outputs[0] for kept in tasks.values()))) > _ROWS_KEPT:
                del tasks[next(iter(tasks))]  # the one that was used longest ago: of a prompt, mostly
            task = StackTask(x, self._matrices, turns, mask, rooms, like)
        tasks[key] = task
        return task


def _rows(x: Tensor) -> int:
    return x.shape[0] * x.shape[1]
