# SPDX-License-Identifier: Apache-2.0
"""The steps of one draft: what does not change from one to the next is looked up before the first.

Between two steps of a draft nobody writes to weights, packs matrices or hooks modules; a step of a small head takes
less time than to see that nobody did.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from hf_polyspec.cpu.block_parts import has_hooks
from hf_polyspec.cpu.compiled import computes
from hf_polyspec.eagle.fused_step import Plan, plan_of, reads_mask
from hf_polyspec.eagle.head_cache import HeadCache
from hf_polyspec.eagle.masks import attention_mask_4d

if TYPE_CHECKING:
    from hf_polyspec.cpu.compiled.pair_input import Norm
    from hf_polyspec.eagle.modeling import EagleHead


@dataclass(frozen=True)
class _Found:
    """What is looked up once.

    Attributes:
        plan: of the head's layer.
        table: rows of embeddings `[V, H]`; None where somebody's code makes them of ids.
        norms: of the embeddings, and of the stream.
        dtype: of everything.
    """

    plan: Plan
    table: Tensor | None
    norms: tuple[Norm, Norm]
    dtype: torch.dtype


class HeadSteps:
    """`EagleHead.step` over one cache, again and again, with the head as it is at the first step.

    Args:
        head: bound.
        cache: extended by every step; what is cropped in between may be.
    """

    def __init__(self, head: EagleHead, cache: HeadCache) -> None:
        self.head = head
        self.cache = cache
        self._found: _Found | None = None
        self._began = False

    def __call__(self, tokens: Tensor, features: Tensor, positions: Tensor, mask: Tensor | None) -> Tensor:
        """`[B, T, H]`, see `EagleHead.step`; tokens and positions are on the host."""
        if not self._began:
            self._found, self._began = _looked_up(self.head), True
        out = None if self._found is None else self._fused(self._found, tokens, features, positions, mask)
        return self.head.step(tokens, features, positions, mask, self.cache) if out is None else out

    def _fused(
        self, found: _Found, tokens: Tensor, stream: Tensor, positions: Tensor, mask: Tensor | None
    ) -> Tensor | None:
        """The same as a few compiled tasks; None, and nothing has changed, where they do not serve this step."""
        from hf_polyspec.cpu.compiled.attention import plain_mask
        from hf_polyspec.cpu.compiled.blocks import FEW
        from hf_polyspec.cpu.compiled.pair_input import pair_input

        batch, count = tokens.shape
        head, past, fits = self.head, self.cache.length, (batch, count, self.head.config.hidden_size)
        if batch * count > FEW or stream.shape != fits or stream.dtype is not found.dtype or not computes(stream):
            return None
        seen, causal = attention_mask_4d(mask, past, count, stream.device, found.dtype)
        blind = seen is None and count > 1 and not (causal and past == 0)
        if blind or not reads_mask(seen, batch, count) or not (tokens.is_cpu and positions.is_cpu):
            return None
        angles = head.rotary_emb.table(stream, int(positions.max()))
        if angles is None:
            return None
        table, ids = found.table, tokens
        if table is None:
            table = head.embed(tokens).flatten(0, 1).contiguous()
            ids = torch.arange(batch * count).view(batch, count)
        plan, stream = found.plan, stream.contiguous()
        keys, values = self.cache.reserve(0, (batch, plan.shape.shared, count, plan.shape.size), stream)
        room = keys, values, past
        seen = None if seen is None else plain_mask(seen)
        task, turned = plan.task(stream, seen, room)
        pair_input(
            ids.contiguous(),
            table,
            stream,
            found.norms,
            positions.expand(batch, -1).contiguous(),
            angles,
            task.read,
            turned,
        )
        task.run(stream, (turned[0], turned[1]), seen, [room])
        self.cache.advance(count)
        out = task.outputs[0].clone()
        return head.norm(out) if head.config.norm_output else out


def _looked_up(head: EagleHead) -> _Found | None:
    """None where a step is not computed as one task."""
    config = head.config
    like = torch.empty(1, 1, config.hidden_size, dtype=head.dtype, device=head.device)
    if not computes(like) or config.sliding_window is not None:
        return None
    angles = head.rotary_emb.table(like, 0)
    plan = None if angles is None else plan_of(head, like, angles[0].shape[1])
    if plan is None:
        return None
    layer: Any = head.layers[0]
    first, second = layer.input_layernorm, layer.hidden_norm
    return _Found(plan, _table(head), ((first.weight, first.eps), (second.weight, second.eps)), head.dtype)


def _table(head: EagleHead) -> Tensor | None:
    """The rows that a plain embedding gives, None for other ones."""
    module = head.get_input_embeddings()
    if type(module) is not nn.Embedding or "forward" in module.__dict__ or has_hooks(module):
        return None
    weight = module.weight
    scaled = module.max_norm is not None  # writes to the rows it reads
    plain = type(weight) is nn.Parameter and weight.is_cpu and weight.is_contiguous() and weight.dtype is head.dtype
    fits = weight.shape[1] == head.config.hidden_size and weight.shape[0] >= head.config.vocab_size
    return weight.detach() if plain and fits and not scaled else None
