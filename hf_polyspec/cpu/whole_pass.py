# SPDX-License-Identifier: Apache-2.0
"""A pass of a whole model over a few tokens as two tasks, from ids to the likeliest ids.

The weights of a pass push everything else out of the processor's caches, so what runs between two passes finds neither
its code nor its objects there: a call of torch's takes five times as long as in a loop of its own, and a middle's pass
of three milliseconds had one more around it. Here are no calls of torch's: rows of the embedding are copied, angles
are looked up in a table, and of the logits only the likeliest id is handed on.
"""

from __future__ import annotations

from collections.abc import Sequence
from ctypes import string_at
from operator import is_
from threading import get_ident
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from hf_polyspec.cpu.angles import Angles, lent_numbers_of, numbers_of
from hf_polyspec.cpu.block_parts import BlockParts, fits
from hf_polyspec.cpu.block_products import compiled_product
from hf_polyspec.cpu.compiled import computes
from hf_polyspec.cpu.compiled.places import held as lies_here
from hf_polyspec.cpu.joint_product import change_count
from hf_polyspec.cpu.stack_plan import Plan
from hf_polyspec.exactness.largest import largest
from hf_polyspec.host.fed import Fed, OneRow
from hf_polyspec.host.moments import Moment
from hf_polyspec.host.rooms import Rooms
from hf_polyspec.host.span import Span

if TYPE_CHECKING:
    from hf_polyspec.cpu.compiled.ends import EndTask
    from hf_polyspec.cpu.compiled.whole_stack import StackTask

Around = tuple[Any, Any, Any, Any]
"""What is called around the layers: embedding, angles, norm and lm_head."""

_Tasks = tuple[Any, Tensor, "StackTask", "EndTask", Any, Any]
"""For so many positions: their inputs as numpy and as torch see them, blocks and end, and of a row that is alone parts
of attention, and the columns that those see with none before them."""
_ROWS_KEPT = 128
"""Positions of all tasks together that are kept, each of which has memory for as many logits as there are ids."""


class WholePass:
    """Passes of one model, in one thread.

    Args:
        plan: of all of its blocks; around: see `Around`; known: ids that are looked at.
        x: `[1, F, H]`, what the first block is given in a pass.

    Attributes:
        alike: whether the model's own modules around the blocks say the same; None before the first pass, and once
            something has changed.

    Raises:
        LookupError: something around the layers is of a kind that is not known here.
    """

    def __init__(self, plan: Plan, around: Around, known: int, x: Tensor) -> None:
        self._plan, self._around, self._known = plan, around, known
        self._dtype, self._width = x.dtype, x.shape[2]
        self._found = self._look()
        if self._found is None:
            raise LookupError("no such model")
        self._moment: Moment | None = None
        embedding, _, self._norm, _ = around
        # Kept here: what another thread puts in their place frees none of them.
        self._weight: Tensor = embedding.weight.detach()
        self._rows, self._size = lent_numbers_of(self._weight), self._weight.untyped_storage().nbytes()
        self._angles = Angles(around[1], self._weight[None, :1])
        self._tasks: dict[int, _Tasks] = {}
        self._threads, self._thread = torch.get_num_threads(), get_ident()
        self.alike: bool | None = None
        self._under_way = False

    def shares_with(self, other: WholePass) -> bool:
        """Whether both multiply by the same matrices."""
        mine, theirs = self._found, other._found
        same = mine is not None and theirs is not None and mine[0] is theirs[0]
        return same and self._weight.data_ptr() == other._weight.data_ptr()

    def _look(self) -> tuple[object, ...] | None:
        """What the numbers depend on besides the blocks, None where they cannot be computed here."""
        embedding, rotary, norm, head = self._around
        kind = BlockParts(self._plan.layers[0]).norms[0]
        plain = type(embedding) is nn.Embedding and embedding.max_norm is None and "forward" not in embedding.__dict__
        if not plain or type(norm) is not type(kind) or "forward" in norm.__dict__:
            return None
        weight = embedding.weight
        alike = weight.dtype is self._dtype and weight.is_contiguous() and lies_here(weight)
        product = compiled_product([head], self._dtype, 1)
        if not alike or product is None or product.dtype not in (torch.int8, torch.uint8, self._dtype):
            return None
        if weight.shape[1] != self._width or product.shape[1] != self._width:
            return None
        x = weight.detach()[None, :1]
        if not fits(norm.weight, x):
            return None
        own = [*rotary._buffers.values(), weight, norm.weight]
        numbers = (value for value in vars(rotary).values() if isinstance(value, (int, float, str)))
        places = [(one.data_ptr(), change_count(one)) for one in own if isinstance(one, Tensor)]
        # What is written through `.data` is counted by nobody. Weights are read where they lie, angles only once.
        angles = [_bytes(one.detach()) for one in rotary._buffers.values() if isinstance(one, Tensor)]
        return (product, norm.variance_epsilon, *numbers, *places, *angles)

    def serves(self, around: Around, known: int) -> bool:
        """Whether this is for the same modules and ids, has been compared, and nothing was found to have changed.

        In a pass somebody's code may begin another text, which it does not serve.
        """
        return bool(self.alike) and not self._under_way and known == self._known and all(map(is_, around, self._around))

    def same(self, around: Around, known: int, moment: Moment) -> bool:
        """Whether all that the numbers depend on still is what it was; looked at once a moment, the blocks left aside,
        of which it is asked in every pass where their weights lie.

        Args:
            around, known: as they are now.
        """
        from hf_polyspec.cpu.compiled.tasks import profiling

        if get_ident() != self._thread:
            return False  # a task is one thread's own, which may have begun another text since this one went on here
        current = self._plan.blocks[0].plans.get(len(self._plan.layers)) is self._plan
        if not current or self._weight.untyped_storage().nbytes() != self._size:
            # Made anew since, as for layers that are packed for each call, or the embedding's memory was taken away.
            self.alike = None
            return False
        if self._moment is moment:
            return True
        alike = known == self._known and all(map(is_, around, self._around))
        ready = torch.get_num_threads() == self._threads and computes(self._weight[None, :1]) and not profiling()
        found = alike and ready and self._look() == self._found
        self._moment = moment if found else None
        if not found:
            self.alike = None
        return found

    def run(self, fed: Fed, moment: Moment, exact: bool) -> tuple[list[int], list[float]]:
        """A pass over new columns, which the cache holds as well then.

        Args:
            fed: F ids and where they go; moment: this one.
            exact: whether rounding, too, is to be that of the model's own norm.

        Returns:
            Per id, the likeliest behind it, and how many logits it is ahead; nothing, and the cache is what it was,
            where that cannot be told or something has changed.

        Raises:
            MemoryError: there is no memory to work in.
        """
        if self._under_way or min(fed.ids) < 0 or max(fed.ids) >= len(self._rows):
            return [], []  # of ids that do not exist torch says so
        self._under_way = True
        try:
            return self._run(fed, moment, exact)
        finally:
            self._under_way = False

    def _run(self, fed: Fed, moment: Moment, exact: bool) -> tuple[list[int], list[float]]:
        count, shape = len(fed.ids), self._plan.shape
        rooms = fed.rooms(len(self._plan.layers), (1, shape.shared, count, shape.size), self._weight, moment)
        if rooms is None or not self._plan.same(self._weight, moment):
            return [], []
        given, x, stack, end, jobs, reach = self._tasks.get(count) or self._made(count, rooms)
        given[:] = self._rows[fed.ids] if count > 1 else self._rows[fed.ids[0]]
        cos, sin = self._angles.at(fed.positions)
        turns = cos.ctypes.data, sin.ctypes.data
        with stack.under_way():
            if isinstance(fed, OneRow):
                jobs[:, 3] = reach + fed.held
                stack.go_on(x.data_ptr(), turns, jobs, rooms)
            else:
                columns = np.array([column for span in fed.spans for column in span.written], np.int64)
                stack.go_on(x.data_ptr(), turns, self._jobs(fed.spans), rooms, columns.ctypes.data)
            end.run()
        likeliest: list[int] = end.ids.tolist()
        if min(likeliest) < 0 or not self._agrees(fed, (cos, sin), x, stack.outputs[-1], end):
            return [], []
        leads: list[float] = end.leads.tolist()
        if exact and end.close.any():
            self._decide(stack.outputs[-1], end, likeliest, leads)
        fed.hold()
        return likeliest, leads

    def _jobs(self, spans: Sequence[Span]) -> Any:
        """Parts of attention."""
        from hf_polyspec.cpu.own_rows import jobs_of

        return jobs_of(spans, self._plan.shape.heads // self._plan.shape.shared).numpy()

    def _agrees(self, fed: Fed, turns: tuple[Any, Any], x: Tensor, states: Tensor, end: EndTask) -> bool:
        """Whether the model's own modules around the blocks say the same; asked in the first pass."""
        from hf_polyspec.cpu.compiled.ends import SLACK

        if self.alike is None:
            embedding, rotary, _, _ = self._around
            own = rotary(x, position_ids=torch.tensor([list(fed.positions)], device="cpu"))
            alike = torch.equal(embedding(torch.tensor([list(fed.ids)], device="cpu")), x) and all(
                np.array_equal(self._angles.numbers(turn), mine) for turn, mine in zip(own, turns, strict=True)
            )
            logits, mine = self._logits(self._normed(states)), end.logits[:, : self._known].float()
            alike &= float((logits - mine).abs().max()) <= 8 * SLACK[self._dtype] * float(logits.abs().max())
            self.alike = alike
        return bool(self.alike)

    def _decide(self, states: Tensor, end: EndTask, likeliest: list[int], leads: list[float]) -> None:
        """Say of positions at which two ids are within rounding what the model's own norm says, which mostly rounds no
        number of a position otherwise: then its logits are the same, too."""
        normed = self._normed(states)
        rows = [row for row in end.close.nonzero()[0].tolist() if not torch.equal(normed[row], end.normed[row])]
        if not rows:
            return
        for row, logits in zip(rows, self._logits(normed[rows]), strict=True):
            first = likeliest[row] = int(largest(logits))
            leads[row] = float(logits[first] - logits.topk(min(2, len(logits))).values[-1])

    def _normed(self, states: Tensor) -> Tensor:
        """`[F, H]` of what the last block gave, by the model's own norm."""
        normed: Tensor = self._norm(states)[0]
        return normed

    def _logits(self, normed: Tensor) -> Tensor:
        """`[F, known]`, float32, by the model's own head."""
        logits: Tensor = self._around[3](normed[None])[0, :, : self._known].float()
        return logits

    def _made(self, fed: int, rooms: Rooms) -> _Tasks:
        from hf_polyspec.cpu.compiled.ends import EndTask

        x = torch.empty(1, fed, self._width, dtype=self._dtype, device="cpu")
        turns = x.new_zeros(1, fed, self._plan.shape.size)
        stack = self._plan.task(x, (turns, turns), None, rooms)
        product: Any = self._found[0] if self._found else None
        norm = self._norm.weight.detach(), self._norm.variance_epsilon
        end = EndTask(stack.outputs[-1], norm, product, min(self._known, product.shape[0]))
        while self._tasks and fed + sum(self._tasks) > _ROWS_KEPT:
            del self._tasks[next(iter(self._tasks))]  # the one that was made longest ago
        jobs = self._jobs([Span(0, fed, 0, 0)])
        found = self._tasks[fed] = numbers_of(x[0]), x, stack, end, jobs, jobs[:, 3].copy()
        return found


def _bytes(tensor: Tensor) -> bytes:
    found = tensor.cpu().contiguous()
    return string_at(found.data_ptr(), found.nbytes)
