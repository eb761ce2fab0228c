# SPDX-License-Identifier: Apache-2.0
"""Decoder blocks in one call or a dozen instead of a hundred.

On a small model a pass over a handful of tokens spends more time between its matrix products than in them. Blocks of
the kind that Llama, Mistral, Qwen2 and their kin have are computed here by compiled steps (see `compiled.blocks` and
`compiled.attention`) that round where the block's own operations round. What a block is, is found out by looking and
then by trying: it is fused only if both ways give the same numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import is_
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from hf_polyspec.cpu.block_parts import BlockParts, matters, plain_turns, readable_mask, readable_turns
from hf_polyspec.cpu.block_products import block_products, block_shape, joint_output, new_states
from hf_polyspec.cpu.compiled import computes
from hf_polyspec.cpu.freed import keep_freed
from hf_polyspec.cpu.fused_stack import follow_trail, leave_trail, outputs_of, seen_again, stack_output, waiting_output
from hf_polyspec.cpu.own_rows import apart_of, takes_rows
from hf_polyspec.cpu.stack_plan import Link, Plan
from hf_polyspec.host.attention import plain_sdpa
from hf_polyspec.host.cache import RollbackCache
from hf_polyspec.host.growing import GrowingLayer, Past, growing_layer, grows
from hf_polyspec.host.moments import Moment
from hf_polyspec.host.ragged_cache import RaggedCache
from hf_polyspec.host.release import named_cache, parameters_of
from hf_polyspec.host.spans import pass_under_way

if TYPE_CHECKING:
    from hf_polyspec.cpu.compiled.whole_block import BlockProducts


class FusedBlock:
    """Takes the place of one decoder layer's `forward`; the layer and everything inside stay what they are.

    Args:
        layer: See `fusable`.
    """

    def __init__(self, layer: nn.Module) -> None:
        self.layer = layer
        self.parts = BlockParts(layer)
        # Layers of one release call their cache alike; one without any never gets one.
        self.cache_argument = named_cache(parameters_of(type(layer).forward)) or ""
        self.link = Link()
        self.plans: dict[int, Plan] = {}

    def __call__(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        *args: Any,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        **kwargs: Any,
    ) -> Any:
        layer: Any = self.layer
        x, turns = hidden_states, position_embeddings
        past = kwargs.pop(self.cache_argument, None)
        if not args and not any(matters(name, value) for name, value in kwargs.items()):
            found = waiting_output(self, x, attention_mask, past, turns)
            if found is not None:
                return found
        if (
            not args
            and turns is not None
            and computes(x)
            and self.parts.ready(x, kwargs)
            and readable_mask(attention_mask, x)
            and readable_turns(turns, x, self.parts.attention.head_dim)
        ):
            return self.compute(x.contiguous(), attention_mask, past, turns)
        given = {self.cache_argument: past, "position_embeddings": turns}
        return type(layer).forward(layer, x, attention_mask, *args, **given, **kwargs)

    def compute(self, x: Tensor, mask: Tensor | None, past: Any, turns: tuple[Tensor, Tensor]) -> Tensor:
        """The block's output `[B, F, H]`.

        Args:
            x: `[B, F, H]`; mask: as for torch's scaled_dot_product_attention; past: a cache or None.
            turns: cosines and sines `[B or 1, F, D]`.
        """
        from hf_polyspec.cpu.compiled.tasks import profiling

        keep_freed()
        # One task would be one bar in a profile; the steps show what the time goes to.
        one_task = not profiling()
        if one_task and grows(past) and self._writes_into(past, x, mask):
            follow_trail(self, x, mask, past, turns)
            found = stack_output(self, x, mask, past, turns)
            if found is not None:
                return found
            products = block_products(self.parts, x.dtype)
            if products is not None:
                found = self._at_once(x, mask, past, plain_turns(turns, x), products)
                leave_trail(self, found, mask, past, turns)
                return found
        return self._in_steps(x, mask, past, plain_turns(turns, x))

    def outputs_of(
        self,
        layers: Sequence[nn.Module],
        x: Tensor,
        mask: Tensor | None,
        past: Any,
        turns: tuple[Tensor, Tensor],
        moment: Moment | None = None,
        last: bool = False,
    ) -> list[Tensor] | None:
        """The outputs of several layers computed together, which stay what they are until the next pass.

        Args:
            layers: this block's and those behind it; x: `[B, F, H]`, what the first of them reads.
            mask, past, turns: as for `compute`.
            moment: of which one look at the layers is enough, if the thread is in one.
            last: whether the last layer's output is all that will be looked at.

        Returns:
            `[B, F, H]` of each; None, and nothing has changed, where they cannot be computed together.
        """
        from hf_polyspec.cpu.compiled.tasks import profiling

        if moment is not None:  # what is asked below was asked in its first pass
            found = seen_again(self, layers, x, mask, past, turns, moment, last)
            if found is not None:
                return found
        size = self.parts.attention.head_dim
        readable = computes(x) and readable_mask(mask, x) and readable_turns(turns, x, size)
        if not readable or profiling() or not grows(past) or not self._writes_into(past, x, mask):
            return None
        return outputs_of(self, layers, x.contiguous(), mask, past, turns, moment, last)

    def whole_pass(self, layers: Sequence[nn.Module], around: tuple[Any, Any, Any, Any], known: int) -> Any:
        """Passes of the whole model whose layers these are (see `WholePass`), None where there can be none."""
        from hf_polyspec.cpu.whole_pass import WholePass

        plan = self.plans.get(len(layers))
        if plan is None or not plan.in_order or not all(map(is_, plan.layers, layers)):
            return None
        if plan.whole is not None and plan.whole.serves(around, known):
            return plan.whole  # its tasks are made, and the processor may still know their memory
        weight = around[0].weight
        try:
            plan.whole = made = WholePass(plan, around, known, weight.detach()[None, :1])
        except LookupError:
            return None
        return made

    def _writes_into(self, past: Past, x: Tensor, mask: Tensor | None) -> bool:
        """Whether the cache holds what this block would write, and the mask covers all of it."""
        index = self.parts.attention.layer_idx
        if isinstance(past, RaggedCache):
            return takes_rows(past, index, new_states(block_shape(self.parts), x), x, mask)
        seen = past.get_seq_length(index)
        layer = growing_layer(past, index)
        if seen and (layer is None or not layer.holds(new_states(block_shape(self.parts), x), x)):
            return False
        # The first columns of a cache that is not ours are put there as its own class does it.
        if not seen and type(past) is not RollbackCache:
            return False
        return mask is None or mask.shape[3] == seen + x.shape[1]

    def _at_once(
        self, x: Tensor, mask: Tensor | None, past: Past, turns: tuple[Tensor, Tensor], products: BlockProducts
    ) -> Tensor:
        from hf_polyspec.cpu.compiled.attention import plain_mask
        from hf_polyspec.cpu.compiled.whole_block import whole_block

        shape, index = block_shape(self.parts), self.parts.attention.layer_idx
        new = new_states(shape, x)
        if isinstance(past, RaggedCache):
            past.open(index, new, x)
        layer = growing_layer(past, index)
        room = layer.extend(new, x) if isinstance(layer, GrowingLayer) else past.extend(index, new, x)
        apart = apart_of(past, shape.heads // shape.shared)
        return whole_block(x, products, shape, turns, None if mask is None else plain_mask(mask), room, apart)

    def _in_steps(self, x: Tensor, mask: Tensor | None, past: Any, turns: tuple[Tensor, Tensor]) -> Tensor:
        from hf_polyspec.cpu.compiled.blocks import gated, rms_norm, rotate

        attention, (first, second) = self.parts.attention, self.parts.norms
        y, _ = rms_norm(x, first.weight, first.variance_epsilon)
        joint = joint_output(self.parts.joint, y)
        shape = block_shape(self.parts)
        queries, keys, values = rotate(joint, *turns, shape.heads, shape.shared)
        if past is not None:
            keys, values = past.update(keys, values, attention.layer_idx)
        update = self.parts.output[0](_attention(attention, queries, keys, values, mask))
        y, x = rms_norm(x, second.weight, second.variance_epsilon, update)
        update = self.parts.down[0](gated(joint_output(self.parts.gates, y)))
        total: Tensor = x + update
        return total

    def __getstate__(self) -> dict[str, object]:
        # Copies find out by themselves who follows, and what is kept for that is the threads' own.
        return {**self.__dict__, "link": Link(), "plans": {}}


def _attention(module: Any, queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
    from hf_polyspec.cpu.compiled.attention import attend, readable

    under_way = pass_under_way()
    if under_way is not None:  # over columns of several rows, each of which has a region of keys and values
        parts = under_way.rows(queries, keys, values, mask)
        return torch.cat([attend(q.contiguous(), k, v, own, module.scaling) for q, k, v, own in parts], dim=1)
    alike = keys.dtype is queries.dtype and values.stride() == keys.stride() and values.shape == keys.shape
    if alike and readable(keys) and (mask is None or mask.shape[3] == keys.shape[2]):
        return attend(queries, keys, values, mask, module.scaling)
    out: Tensor = plain_sdpa()(module, queries, keys, values, mask, scaling=module.scaling)[0]
    return out.reshape(out.shape[0], out.shape[1], -1)
