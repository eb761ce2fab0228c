# SPDX-License-Identifier: Apache-2.0
"""A step of an EAGLE-3 head of one layer as one compiled task, where its matrices are packed.

A step is a product of a few million weights, which the memory delivers in less time than torch takes to be called
thirty times. The task is the one of a decoder block (`cpu.compiled.whole_block`); what its attention reads, an
embedding beside the stream, is put there first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from threading import local
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from hf_polyspec.cpu.block_parts import has_hooks
from hf_polyspec.cpu.block_products import compiled_product
from hf_polyspec.cpu.compiled import computes
from hf_polyspec.cpu.joint_product import change_count
from hf_polyspec.eagle.head_cache import HeadCache
from hf_polyspec.host.attention import attention_name

if TYPE_CHECKING:
    from hf_polyspec.cpu.compiled.whole_block import BlockProducts, BlockShape
    from hf_polyspec.cpu.compiled.whole_stack import PairTask

_ROWS_KEPT = 256
"""Positions of all shapes of steps together for which a thread keeps tasks, with the memory that they write to."""

_plans: WeakKeyDictionary[nn.Module, Plan] = WeakKeyDictionary()


@dataclass(frozen=True)
class Plan:
    """What is kept from step to step, as long as the layers and their weights stay what they are.

    Attributes:
        mark: of what it was made of; products, shape: of the layer.
        own: by thread, tasks by the shape of their input: a task and its memory belong to one thread.
    """

    mark: tuple[object, ...]
    products: BlockProducts
    shape: BlockShape
    own: Any

    def task(self, x: Tensor, mask: Tensor | None, room: Any) -> tuple[PairTask, Tensor]:
        """The task for a step of this shape, and room for its angles, `[2, B, T, d]`."""
        from hf_polyspec.cpu.compiled.whole_stack import PairTask

        tasks: dict[object, tuple[PairTask, Tensor]] = self.own.__dict__.setdefault("tasks", {})
        key = x.shape[0], x.shape[1], torch.get_num_threads()
        found = tasks.get(key)
        if found is None:
            if sum(map(_rows, (x, *(task.read for task, _ in tasks.values())))) > _ROWS_KEPT:
                tasks.clear()
            turned = x.new_zeros(2, *x.shape[:2], self.shape.size)
            turns = turned[0], turned[1]
            found = tasks[key] = PairTask(x, self.products, self.shape, turns, mask, room), turned
        return found


def fused_step(
    head: Any,
    stream: Tensor,
    embedded: Tensor,
    rotary: tuple[Tensor, Tensor],
    mask: Tensor | None,
    causal: bool,
    cache: HeadCache | None,
) -> Tensor | None:
    """`EagleHead.step` behind its embedding.

    Args:
        head: an `EagleHead`; stream, embedded: `[B, T, H]`.
        rotary: angles `[B or 1, T, d]`; mask, causal: see `attention_mask_4d`.
        cache: extended by T.

    Returns:
        `[B, T, H]`; None, and nothing has changed, where the head or this input is of another kind.
    """
    if cache is None or not (computes(stream) and computes(embedded)):
        return None
    batch, count = stream.shape[:2]
    if (mask is None and count > 1 and not (causal and cache.length == 0)) or not reads_mask(mask, batch, count):
        return None
    plan = plan_of(head, stream, rotary[0].shape[2])
    if plan is None:
        return None
    from hf_polyspec.cpu.compiled.attention import plain_mask
    from hf_polyspec.cpu.compiled.blocks import rms_norm

    layer, shape = head.layers[0], plan.shape
    stream = stream.contiguous()
    turns = rotary[0].contiguous(), rotary[1].contiguous()
    keys, values = cache.reserve(0, (batch, shape.shared, count, shape.size), stream)
    room = (keys, values, cache.length)
    seen = None if mask is None else plain_mask(mask)
    task, _ = plan.task(stream, seen, room)
    norms = layer.input_layernorm, layer.hidden_norm
    parts = [
        rms_norm(x.contiguous(), norm.weight, norm.eps)[0] for norm, x in zip(norms, (embedded, stream), strict=True)
    ]
    torch.cat(parts, dim=-1, out=task.read)
    task.run(stream, turns, seen, [room])
    cache.advance(count)
    out = task.outputs[0].clone()
    return head.norm(out) if head.config.norm_output else out


def _rows(x: Tensor) -> int:
    return x.shape[0] * x.shape[1]


def reads_mask(mask: Tensor | None, batch: int, count: int) -> bool:
    """Whether a mask is one for all heads, bool or added."""
    return mask is None or (
        mask.dim() == 4
        and mask.shape[1] == 1
        and mask.shape[0] in (1, batch)
        and mask.shape[2] == count
        and (mask.dtype is torch.bool or mask.dtype.is_floating_point)
    )


def plan_of(head: Any, x: Tensor, turned: int) -> Plan | None:
    """What is kept for a head, made anew if anything has changed; None where it cannot be computed as one task."""
    from hf_polyspec.cpu.compiled.blocks import FEW

    if x.shape[0] * x.shape[1] > FEW or not _is_plain(head, turned):
        return None
    layer = head.layers[0]
    mark = _mark(layer, x.dtype)
    if mark is None:
        return None
    plan = _plans.get(layer)
    if plan is None or plan.mark != mark:
        made = _made(layer, x.dtype, mark)
        if made is None:
            return None
        plan = _plans[layer] = made
    return plan


def _is_plain(head: Any, turned: int) -> bool:
    config = SimpleNamespace(**vars(head.config))  # a config's own way to an attribute takes microseconds
    return (
        config.algorithm == "eagle3"
        and config.num_hidden_layers == 1
        and not (config.norm_before_residual or config.qk_norm or head.training)
        and config.hidden_act == "silu"
        and turned == config.head_dim
        and attention_name(head.config) == "sdpa"
    )


def _linears(layer: Any) -> tuple[Sequence[nn.Module], ...]:
    attention, mlp = layer.self_attn, layer.mlp
    joint = (attention.q_proj, attention.k_proj, attention.v_proj)
    return joint, (attention.o_proj,), (mlp.gate_proj, mlp.up_proj), (mlp.down_proj,)


def _norms(layer: Any) -> tuple[Any, ...]:
    return layer.input_layernorm, layer.hidden_norm, layer.post_attention_layernorm


def _mark(layer: Any, dtype: torch.dtype) -> tuple[object, ...] | None:
    """What changes when a layer's numbers or what computes them do; None where they are not packed, or of other kinds.

    What is written to weights past torch's counts is not seen: it could only make guesses worse.
    """
    found: list[object] = [dtype]
    for module in (layer, layer.self_attn, layer.mlp, *_norms(layer)):
        if "forward" in module.__dict__ or has_hooks(module):
            return None
    for group in _linears(layer):
        for linear in group:
            forward = linear.__dict__.get("forward")
            weight = linear._parameters.get("weight")
            if forward is None or weight is None or weight.dtype is not dtype:
                return None
            found += (forward, weight.data_ptr(), change_count(weight))
    for norm in _norms(layer):
        weight = norm.weight
        if weight.dtype is not dtype or not weight.is_contiguous():
            return None
        found += (weight.data_ptr(), change_count(weight))
    return tuple(found)


def _made(layer: Any, dtype: torch.dtype, mark: tuple[object, ...]) -> Plan | None:
    from hf_polyspec.cpu.compiled.whole_block import BlockProducts, BlockShape

    found = [compiled_product(group, dtype, 1) for group in _linears(layer)]
    joint, output, gates, down = found
    if joint is None or output is None or gates is None or down is None:
        return None
    products = BlockProducts(joint, output, gates, down)
    if products.stored is not dtype:
        return None
    attention, (_, first, second) = layer.self_attn, _norms(layer)
    size = attention.head_dim
    heads, shared = attention.q_proj.out_features // size, attention.k_proj.out_features // size
    norms = (first.weight, first.eps), (second.weight, second.eps)
    return Plan(mark, products, BlockShape(heads, shared, size, size**-0.5, norms), local())
