# SPDX-License-Identifier: Apache-2.0
"""A pass of a whole model over a few tokens of one row as two tasks, from ids to the likeliest ids.

The weights of a pass push everything else out of the processor's caches, so what runs between two passes finds neither
its code nor its objects there: a call of torch's takes five times as long as in a loop of its own, and a middle's pass
of three milliseconds had one more around it. Here are no calls of torch's: rows of the embedding are copied, angles
are looked up in a table, and of the logits only the likeliest id is handed on.
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import is_
from threading import get_ident
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from hf_polyspec.cpu.block_parts import BlockParts, fits
from hf_polyspec.cpu.block_products import compiled_product
from hf_polyspec.cpu.compiled import computes
from hf_polyspec.cpu.compiled.places import held as lies_here
from hf_polyspec.cpu.joint_product import change_count
from hf_polyspec.cpu.stack_plan import Plan
from hf_polyspec.exactness.largest import largest
from hf_polyspec.host.cache import RollbackCache
from hf_polyspec.host.moments import Moment
from hf_polyspec.host.rooms import Rooms
from hf_polyspec.host.straight import MOST

if TYPE_CHECKING:
    from hf_polyspec.cpu.compiled.ends import EndTask
    from hf_polyspec.cpu.compiled.whole_stack import StackTask

Around = tuple[Any, Any, Any, Any]
"""What is called around the layers: embedding, angles, norm and lm_head."""

_Tasks = tuple[Any, Tensor, "StackTask", "EndTask", Any, Any]
"""For so many positions: their inputs as numpy and as torch see them, blocks and end, parts of attention, and the
columns that those see with none before them."""
_POSITIONS = 1024
"""Positions in a table of angles."""
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
        self._rows = _numbers(self._weight)
        self._angles: tuple[int, Tensor, Tensor] | None = None
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
        if self._plan.blocks[0].plans.get(len(self._plan.layers)) is not self._plan:
            self.alike = None
            return False  # made anew since, as for layers that are packed for each call
        if self._moment is moment:
            return True
        alike = known == self._known and all(map(is_, around, self._around))
        ready = torch.get_num_threads() == self._threads and computes(self._weight[None, :1]) and not profiling()
        found = alike and ready and self._look() == self._found
        self._moment = moment if found else None
        if not found:
            self.alike = None
        return found

    def run(
        self, ids: Sequence[int], position: int, past: RollbackCache, held: int, moment: Moment, exact: bool
    ) -> tuple[list[int], list[float]]:
        """A pass over ids behind the first `held` columns of a cache, which holds them as well then.

        Args:
            ids: F of them; position: of the first; moment: this one.
            exact: whether rounding, too, is to be that of the model's own norm.

        Returns:
            Per id, the likeliest behind it, and how many logits it is ahead; nothing, and the cache is what it was,
            where that cannot be told or something has changed.

        Raises:
            MemoryError: there is no memory to work in.
        """
        if self._under_way or min(ids) < 0 or max(ids) >= len(self._rows):
            return [], []  # of ids that do not exist torch says so
        self._under_way = True
        try:
            return self._run(ids, position, past, held, moment, exact)
        finally:
            self._under_way = False

    def _run(
        self, ids: Sequence[int], position: int, past: RollbackCache, held: int, moment: Moment, exact: bool
    ) -> tuple[list[int], list[float]]:
        fed, shape, count = len(ids), self._plan.shape, len(self._plan.layers)
        rooms = past.rooms_from(held, count, (1, shape.shared, fed, shape.size), self._weight, moment)
        if rooms is None or not self._plan.same(self._weight, moment):
            return [], []
        given, x, stack, end, jobs, reach = self._tasks.get(fed) or self._made(fed, rooms)
        jobs[:, 3] = reach + held
        given[:] = self._rows[list(ids)] if fed > 1 else self._rows[ids[0]]
        turns = self._turns(x, position, fed)
        with stack.under_way():
            stack.go_on(x.data_ptr(), turns, jobs, rooms)
            end.run()
        likeliest: list[int] = end.ids.tolist()
        if min(likeliest) < 0 or not self._agrees(ids, position, x, stack.outputs[-1], end):
            return [], []
        leads: list[float] = end.leads.tolist()
        if exact and end.close.any():
            self._decide(stack.outputs[-1], end, likeliest, leads)
        past.hold(held + fed)
        return likeliest, leads

    def _agrees(self, ids: Sequence[int], position: int, x: Tensor, states: Tensor, end: EndTask) -> bool:
        """Whether the model's own modules around the blocks say the same; asked in the first pass."""
        from hf_polyspec.cpu.compiled.ends import SLACK

        if self.alike is None:
            embedding, rotary, _, _ = self._around
            _, *table = self._angles or (0,)
            first = position % _POSITIONS
            turns = rotary(x, position_ids=torch.arange(position, position + len(ids), device="cpu")[None])
            alike = torch.equal(embedding(torch.tensor([ids], device="cpu")), x) and all(
                torch.equal(own[0].to(self._dtype), mine[first : first + len(ids)])
                for own, mine in zip(turns, table, strict=True)
            )
            logits, mine = self._logits(states), end.logits[:, : self._known].float()
            alike &= float((logits - mine).abs().max()) <= 8 * SLACK[self._dtype] * float(logits.abs().max())
            self.alike = alike
        return bool(self.alike)

    def _decide(self, states: Tensor, end: EndTask, likeliest: list[int], leads: list[float]) -> None:
        """Say of rows in which two ids are within rounding what the model's own norm says."""
        logits = self._logits(states)
        for row in end.close.nonzero()[0].tolist():
            first = likeliest[row] = int(largest(logits[row]))
            of_row = logits[row].topk(min(2, logits.shape[1])).values
            leads[row] = float(logits[row, first] - of_row[-1])

    def _logits(self, states: Tensor) -> Tensor:
        """`[F, known]`, float32, of what the last block gave."""
        _, _, norm, head = self._around
        logits: Tensor = head(norm(states))[0, :, : self._known].float()
        return logits

    def _made(self, fed: int, rooms: Rooms) -> _Tasks:
        from hf_polyspec.cpu.compiled.attention import jobs_apart
        from hf_polyspec.cpu.compiled.ends import EndTask

        x = torch.empty(1, fed, self._width, dtype=self._dtype, device="cpu")
        turns = x.new_zeros(1, fed, self._plan.shape.size)
        stack = self._plan.task(x, (turns, turns), None, rooms)
        product: Any = self._found[0] if self._found else None
        norm = self._norm.weight.detach(), self._norm.variance_epsilon
        end = EndTask(stack.outputs[-1], norm, product, min(self._known, product.shape[0]))
        if fed + sum(self._tasks) > _ROWS_KEPT:
            self._tasks.clear()
        jobs = jobs_apart([(0, fed, 0, fed)], self._plan.shape.heads // self._plan.shape.shared).numpy()
        found = self._tasks[fed] = _numbers(x[0]), x, stack, end, jobs, jobs[:, 3].copy()
        return found

    def _turns(self, x: Tensor, position: int, fed: int) -> tuple[int, int]:
        """Where cosines and sines `[F, D]` lie, from a position on, which a caller may have given: any."""
        begin = position - position % _POSITIONS
        if self._angles is None or self._angles[0] != begin:
            places = torch.arange(begin, begin + _POSITIONS + MOST, device="cpu")[None]
            cos, sin = (turn[0].to(self._dtype).contiguous() for turn in self._around[1](x, position_ids=places))
            self._angles = begin, cos, sin
        _, cos, sin = self._angles
        step = (position - begin) * cos.shape[1] * cos.element_size()
        return cos.data_ptr() + step, sin.data_ptr() + step


def _numbers(tensor: Tensor) -> Any:
    """A tensor's memory as numpy sees it, which knows no bfloat16."""
    return tensor.view({2: torch.int16, 4: torch.int32}[tensor.element_size()]).numpy()


def _bytes(tensor: Tensor) -> bytes:
    found: bytes = tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return found
