# SPDX-License-Identifier: Apache-2.0
"""Fused blocks that are called one after another, computed together when the first of them is called.

Nobody tells which blocks follow each other: each notices which one was called next with what it gave. When the first
of such a chain is called, all of them are computed in one task, and what the others give waits for them. A block that
is then called exactly as expected (with the very tensor that the block before gave, unchanged to the last bit, the
same mask, cache and positions) gives what waits; one that is called otherwise drops what waits, is no longer computed
together with the block before, and computes by itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from operator import is_
from threading import local
from typing import TYPE_CHECKING, Any
from weakref import ref

import torch
from torch import Tensor

from hf_polyspec.cpu.block_parts import plain_turns
from hf_polyspec.cpu.block_products import block_products, block_shape, new_states
from hf_polyspec.cpu.compiled.places import held
from hf_polyspec.cpu.joint_product import change_count
from hf_polyspec.cpu.own_rows import apart_of, takes_rows
from hf_polyspec.cpu.stack_plan import Block, Plan, Turns
from hf_polyspec.host.cache import RollbackCache
from hf_polyspec.host.growing import Past, growing_layer
from hf_polyspec.host.moments import Moment
from hf_polyspec.host.ragged_cache import RaggedCache

if TYPE_CHECKING:
    from hf_polyspec.cpu.compiled.whole_stack import StackTask

_ROWS, _LAST = 128, 512
"""More than so many rows are computed block by block: there the memory in between is large, and Python's part small.
The second is for passes of which the last block's output is all that is looked at: then there is little in between."""


class _Waiting:
    """Outputs of blocks that have been computed and not been asked for, and how they will be asked for."""

    def __init__(self, plan: Plan, task: StackTask, past: Past, mask: Tensor | None, turns: Turns) -> None:
        self._plan, self._outputs = plan, task.outputs
        self._past, self._mask, self._turns = ref(past), mask, turns
        self._counts = _counts(mask, turns)
        self._fed, self._next, self._size = task.outputs[0].shape[1], 0, task.outputs[0].nbytes
        self._given: Tensor | None = None

    def expects(self, block: Block, x: Tensor, mask: Tensor | None, past: Any, turns: object) -> bool:
        """Whether this is how the next block should be called."""
        from hf_polyspec.cpu.compiled.samples import same_bytes

        before = self._outputs[self._next - 1]
        return (
            x is self._given
            and block is self._plan.blocks[self._next]
            and mask is self._mask
            and turns is self._turns
            and past is self._past()
            and not torch.is_grad_enabled()
            and x.shape == before.shape
            and x.dtype is before.dtype
            and x.is_contiguous()
            and held(x)
            # torch's count of changes is not enough: tensors of inference mode have none.
            and same_bytes(x.data_ptr(), before.data_ptr(), self._size)
            and self._counts == _counts(mask, self._turns)
        )

    def give(self, past: Past) -> Tensor | None:
        """The next block's output `[B, F, H]`; None if its part of the cache has changed since it was computed."""
        layer = growing_layer(past, self._plan.blocks[self._next].parts.attention.layer_idx)
        if layer is None or not layer.claim(self._fed):
            return None
        self._given = given = self._outputs[self._next].clone()
        self._next += 1
        return given

    @property
    def done(self) -> bool:
        """Whether all have been asked for."""
        return self._next == len(self._outputs)

    def drop(self) -> None:
        """The next block was not called as expected."""
        self._plan.blocks[self._next - 1].link.cut(wasted=True)


class _Trail:
    """What the block computed last gave, and how it was called."""

    def __init__(self, block: Block, given: Tensor, mask: Tensor | None, past: Past, turns: Turns) -> None:
        self._block, self._given, self._past = ref(block), ref(given), ref(past)
        self._mask, self._turns = mask, turns

    def meet(self, block: Block, x: Tensor, mask: Tensor | None, past: object, turns: object) -> None:
        """Tell the block computed last which one follows, if it is this one."""
        before = self._block()
        if (
            before is not None
            and x is self._given()
            and mask is self._mask
            and turns is self._turns
            and past is self._past()
            and block.parts.attention.layer_idx == before.parts.attention.layer_idx + 1
        ):
            before.link.meet(block)


class _Own(local):
    """What one thread knows."""

    waiting: _Waiting | None = None
    trail: _Trail | None = None


_own = _Own()


def waiting_output(block: Block, x: Tensor, mask: Tensor | None, past: Any, turns: Any) -> Tensor | None:
    """The output of a block if it has been computed already with this input; arguments as for the block.

    If others wait, they are dropped.
    """
    waiting = _own.waiting
    if waiting is None:
        return None
    found = waiting.give(past) if waiting.expects(block, x, mask, past, turns) else None
    if found is None:
        _own.waiting = None
        waiting.drop()
    elif waiting.done:
        _own.waiting = None
        leave_trail(block, found, mask, past, turns)
    return found


def leave_trail(block: Block, given: Tensor, mask: Tensor | None, past: Past, turns: Turns) -> None:
    """Remember how a block was called that computed by itself, so that the next one is recognised."""
    _own.trail = _Trail(block, given, mask, past, turns)


def follow_trail(block: Block, x: Tensor, mask: Tensor | None, past: Past, turns: Turns) -> None:
    """Let the block computed last know that this one follows, if it does."""
    trail, _own.trail = _own.trail, None
    if trail is not None:
        trail.meet(block, x, mask, past, turns)


def stack_output(block: Block, x: Tensor, mask: Tensor | None, past: Past, turns: Turns) -> Tensor | None:
    """The output of a block, computed together with those of the blocks that follow, which wait from now on.

    Args:
        block: It would be computed as one task, and nothing waits.
        x: `[B, F, H]`, contiguous; mask, turns: as the block was given them; past: the cache.

    Returns:
        `[B, F, H]`, None if there is nothing to compute together.
    """
    found = _computed(block, x, mask, past, turns)
    if found is None:
        return None
    waiting = _Waiting(*found, past, mask, turns)
    first = waiting.give(past)
    _own.waiting = waiting
    return first


def outputs_of(
    block: Block,
    layers: Sequence[Any],
    x: Tensor,
    mask: Tensor | None,
    past: Past,
    turns: Turns,
    moment: Moment | None = None,
    last: bool = False,
) -> list[Tensor] | None:
    """The outputs of all of these layers at once, which are written to again in the next pass.

    Args:
        block: of the first layer; layers: all of them; x, mask, past, turns: as for `stack_output`.
        moment: of which one look is enough, if the thread is in one.
        last: whether the last one is all that will be looked at; the others may be anything then.

    Returns:
        `[B, F, H]` of each layer; None, and nothing has changed, if they are not known to follow each other.

    Raises:
        RuntimeError: the cache was changed while they were computed.
    """
    if _own.waiting is not None:
        return None
    again = _again(block, layers, x, mask, past, turns, moment, last)
    if again is not None:
        return again.outputs
    found = _computed(block, x, mask, past, turns, layers)
    if found is None:
        return None
    plan, task = found
    held = [growing_layer(past, member.parts.attention.layer_idx) for member in plan.blocks]
    claimed = [layer is not None and layer.claim(x.shape[1]) for layer in held]
    _claimed(all(claimed))
    return task.outputs


def seen_again(
    block: Block,
    layers: Sequence[Any],
    x: Tensor,
    mask: Tensor | None,
    past: Past,
    turns: Turns,
    moment: Moment,
    last: bool = False,
) -> list[Tensor] | None:
    """`outputs_of` where all was looked at in this moment already; None where it was not."""
    plan = block.plans.get(len(layers))
    if plan is None or not plan.seen(x, moment) or _own.waiting is not None:
        return None
    task = _again(block, layers, x, mask, past, turns, moment, last)
    return None if task is None else task.outputs


def _again(
    block: Block,
    layers: Sequence[Any],
    x: Tensor,
    mask: Tensor | None,
    past: Past,
    turns: Turns,
    moment: Moment | None,
    last: bool,
) -> StackTask | None:
    """The same layers as in an earlier pass, over a cache of ours: what was found then is not looked for anew."""
    from hf_polyspec.cpu.compiled.attention import plain_mask

    plan = block.plans.get(len(layers))
    if plan is None or not plan.in_order or type(past) not in (RollbackCache, RaggedCache):
        return None
    if _rows(x) > (_LAST if last else _ROWS):
        return None
    if not all(map(is_, plan.layers, layers)) or not plan.same(x, moment):
        return None
    new, fed = new_states(plan.shape, x), x.shape[1]
    if type(past) is RaggedCache and not takes_rows(past, 0, new, x, mask):
        return None
    if type(past) is RaggedCache and len(past.layers) < len(layers):
        if any(window is not None for window in past.windows[: len(layers)]):
            return None
        for index in range(len(layers)):
            past.open(index, new, x)
    elif not past.layers:
        past.open(len(layers), new, x)
    rooms = past.rooms(len(layers), new, x)
    if rooms is None or (mask is not None and mask.shape[2:] != (fed, rooms.start + fed)):
        return None
    apart = apart_of(past, plan.shape.heads // plan.shape.shared)
    task = plan.run(x, plain_turns(turns, x), None if mask is None else plain_mask(mask), rooms, apart, last)
    _claimed(past.claim(rooms, fed))
    return task


def _claimed(found: bool) -> None:
    if not found:
        raise RuntimeError("The cache of keys and values was changed during the pass that was to extend it.")


def _computed(
    block: Block, x: Tensor, mask: Tensor | None, past: Past, turns: Turns, layers: Sequence[Any] | None = None
) -> tuple[Plan, StackTask] | None:
    """Blocks that follow each other, computed; of exactly these layers where some are given."""
    from hf_polyspec.cpu.compiled.attention import plain_mask

    if block.link.next() is None or _rows(x) > _ROWS:
        return None
    new = new_states(block_shape(block.parts), x)
    chain = list(_chain(block, past, new, x))
    if layers is not None and not _are(chain, layers):
        return None
    plan = _plan(chain, x) if len(chain) > 1 else None
    if plan is None or (layers is not None and len(plan.blocks) < len(layers)):
        return None
    held = [growing_layer(past, member.parts.attention.layer_idx) for member in plan.blocks]
    rooms = [layer.reserve(new, x) for layer in held if layer is not None]  # the chain was asked already
    shape = block_shape(block.parts)
    apart = apart_of(past, shape.heads // shape.shared)
    return plan, plan.run(x, plain_turns(turns, x), None if mask is None else plain_mask(mask), rooms, apart)


def _are(chain: Sequence[Block], layers: Sequence[Any]) -> bool:
    return len(chain) == len(layers) and all(map(is_, (block.parts.layer for block in chain), layers))


def _chain(block: Block, past: Past, new: tuple[int, int, int, int], x: Tensor) -> Iterator[Block]:
    """A block and those that follow, as far as the cache holds as much for them as for the first.

    A cache knows how deep its model is, when two models share layers.
    """
    first = -1
    following: Block | None = block
    while following is not None:
        layer = growing_layer(past, following.parts.attention.layer_idx)
        if layer is None or not layer.holds(new, x):
            return
        first = layer.get_seq_length() if first < 0 else first
        if layer.get_seq_length() != first:
            return
        yield following
        following = following.link.next()


def _plan(chain: Sequence[Block], x: Tensor) -> Plan | None:
    """What is kept for a chain, made anew if anything has changed; None if nothing of it can go together."""
    plans = chain[0].plans
    plan = plans.get(len(chain))
    if plan is not None and plan.blocks == chain and plan.same(x):
        return plan
    plans.pop(len(chain), None)
    plan = _made(chain, x)
    if plan is not None:
        if len(plans) > 1:
            plans.clear()
        plans[len(plan.blocks)] = plan
    return plan


def _made(chain: Sequence[Block], x: Tensor) -> Plan | None:
    from hf_polyspec.cpu.watch import Watch

    blocks: list[Block] = []
    kind = None
    for block in chain:
        products = block_products(block.parts, x.dtype) if block.parts.ready(x, {}) else None
        if products is None or (blocks and products.stored is not kind):
            if blocks:
                blocks[-1].link.cut(wasted=False)
            break
        kind = products.stored
        blocks.append(block)
    if len(blocks) < 2:
        return None
    watch = Watch([block.parts for block in blocks], x.dtype)
    # Asked again: whatever changes from here on is noticed.
    found = [block_products(block.parts, x.dtype) if block.parts.ready(x, {}) else None for block in blocks]
    products_now = [one for one in found if one is not None and one.stored is kind]
    return Plan(blocks, products_now, watch) if len(products_now) == len(blocks) else None


def _rows(x: Tensor) -> int:
    return x.shape[0] * x.shape[1]


def _counts(mask: Tensor | None, turns: Turns) -> tuple[int, int, int]:
    cos, sin = turns
    return 0 if mask is None else change_count(mask), change_count(cos), change_count(sin)
