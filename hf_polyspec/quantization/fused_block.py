# SPDX-License-Identifier: Apache-2.0
"""Decoder blocks in one call or a dozen instead of a hundred.

On a small model a pass over a handful of tokens spends more time between its matrix products than in them. Blocks of
the kind that Llama, Mistral, Qwen2 and their kin have are computed here by compiled steps (see `compiled.blocks` and
`compiled.attention`) that round where the block's own operations round. What a block is, is found out by looking and
then by trying: it is fused only if both ways give the same numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from hf_polyspec.cache import RollbackCache
from hf_polyspec.compiled import computes
from hf_polyspec.quantization.block_parts import BlockParts, readable_mask, readable_turns
from hf_polyspec.quantization.by_rows import ByRows, Kernel
from hf_polyspec.quantization.joint_product import JointProduct
from hf_polyspec.quantization.linear import QuantizedLinear

if TYPE_CHECKING:
    from hf_polyspec.compiled.product import Product
    from hf_polyspec.compiled.whole_block import BlockProducts, BlockShape


class FusedBlock:
    """Takes the place of one decoder layer's `forward`; the layer and everything inside stay what they are.

    Args:
        layer: See `fusable`.
    """

    def __init__(self, layer: nn.Module) -> None:
        self.layer = layer
        self._parts = BlockParts(layer)

    def __call__(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        *args: Any,
        past_key_values: Any = None,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        **kwargs: Any,
    ) -> Any:
        layer: Any = self.layer
        x, turns = hidden_states, position_embeddings
        if (
            not args
            and turns is not None
            and computes(x)
            and self._parts.ready(x, kwargs)
            and readable_mask(attention_mask, x)
            and readable_turns(turns, x, self._parts.attention.head_dim)
        ):
            return self.compute(x.contiguous(), attention_mask, past_key_values, turns)
        given = {"past_key_values": past_key_values, "position_embeddings": turns}
        return type(layer).forward(layer, x, attention_mask, *args, **given, **kwargs)

    def compute(self, x: Tensor, mask: Tensor | None, past: Any, turns: tuple[Tensor, Tensor]) -> Tensor:
        """The block's output `[B, F, H]`.

        Args:
            x: `[B, F, H]`; mask: as for torch's scaled_dot_product_attention; past: a cache or None.
            turns: cosines and sines `[B or 1, F, D]`.
        """
        from hf_polyspec.compiled.tasks import profiling

        turns = turns[0].to(x.dtype).contiguous(), turns[1].to(x.dtype).contiguous()
        # One task would be one bar in a profile; the steps show what the time goes to.
        if type(past) is RollbackCache and self._writes_into(past, x, mask) and not profiling():
            products = self._products(x)
            if products is not None:
                return self._at_once(x, mask, past, turns, products)
        return self._in_steps(x, mask, past, turns)

    def _writes_into(self, past: RollbackCache, x: Tensor, mask: Tensor | None) -> bool:
        """Whether the cache holds what this block would write, and the mask covers all of it."""
        index = self._parts.attention.layer_idx
        seen = past.get_seq_length(index)
        if seen:
            keys: Any = past.layers[index].keys
            if keys.dtype is not x.dtype or keys.device != x.device or keys.shape[0] != x.shape[0]:
                return False
        return mask is None or mask.shape[3] == seen + x.shape[1]

    def _products(self, x: Tensor) -> BlockProducts | None:
        """The block's matrices, where compiled products are what computes all of them."""
        from hf_polyspec.compiled.whole_block import BlockProducts

        joint = compiled_product(self._parts.joint, x.dtype)
        output = compiled_product(self._parts.output, x.dtype)
        gates = compiled_product(self._parts.gates, x.dtype)
        down = compiled_product(self._parts.down, x.dtype)
        if joint is None or output is None or gates is None or down is None:
            return None
        products = BlockProducts(joint, output, gates, down)
        return products if products.stored in (torch.int8, torch.uint8, x.dtype) else None

    def _at_once(
        self, x: Tensor, mask: Tensor | None, past: RollbackCache, turns: tuple[Tensor, Tensor], products: BlockProducts
    ) -> Tensor:
        from hf_polyspec.compiled.attention import plain_mask
        from hf_polyspec.compiled.whole_block import whole_block

        shape = self._shape()
        new = (x.shape[0], shape.shared, x.shape[1], shape.size)
        room = past.extend(self._parts.attention.layer_idx, new, x)
        return whole_block(x, products, shape, turns, None if mask is None else plain_mask(mask), room)

    def _shape(self) -> BlockShape:
        from hf_polyspec.compiled.whole_block import BlockShape

        attention, (first, second) = self._parts.attention, self._parts.norms
        norms = (first.weight, first.variance_epsilon), (second.weight, second.variance_epsilon)
        shared = self._parts.joint[1].out_features // attention.head_dim
        heads = shared * attention.num_key_value_groups
        return BlockShape(heads, shared, attention.head_dim, attention.scaling, norms)

    def _in_steps(self, x: Tensor, mask: Tensor | None, past: Any, turns: tuple[Tensor, Tensor]) -> Tensor:
        from hf_polyspec.compiled.blocks import gated, rms_norm, rotate

        attention, (first, second) = self._parts.attention, self._parts.norms
        y, _ = rms_norm(x, first.weight, first.variance_epsilon)
        joint = joint_output(self._parts.joint, y)
        shape = self._shape()
        queries, keys, values = rotate(joint, *turns, shape.heads, shape.shared)
        if past is not None:
            keys, values = past.update(keys, values, attention.layer_idx)
        update = self._parts.output[0](_attention(attention, queries, keys, values, mask))
        y, x = rms_norm(x, second.weight, second.variance_epsilon, update)
        update = self._parts.down[0](gated(joint_output(self._parts.gates, y)))
        total: Tensor = x + update
        return total


def _attention(module: Any, queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
    from hf_polyspec.compiled.attention import attend, readable

    alike = keys.dtype is queries.dtype and values.stride() == keys.stride() and values.shape == keys.shape
    if alike and readable(keys) and (mask is None or mask.shape[3] == keys.shape[2]):
        return attend(queries, keys, values, mask, module.scaling)
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    plain = ALL_ATTENTION_FUNCTIONS["sdpa"]
    out: Tensor = plain(module, queries, keys, values, mask, scaling=module.scaling)[0]
    return out.reshape(out.shape[0], out.shape[1], -1)


def joint_output(layers: Sequence[nn.Module], x: Tensor) -> Tensor:
    """The outputs of layers that read `x`, side by side, from one product where they have one."""
    kernel = _joint_kernel(layers, x.dtype)
    return torch.cat([layer(x) for layer in layers], -1) if kernel is None else kernel(x)


def compiled_product(layers: Sequence[nn.Module], dtype: torch.dtype) -> Product | None:
    """The compiled product that gives the outputs of layers, if it is the one that would be used."""
    from hf_polyspec.compiled.digits import DigitProduct
    from hf_polyspec.compiled.product import CompiledProduct

    kernel = _joint_kernel(layers, dtype)
    if isinstance(kernel, ByRows):
        kernel = kernel.few
    return kernel if isinstance(kernel, CompiledProduct | DigitProduct) else None


def _joint_kernel(layers: Sequence[nn.Module], dtype: torch.dtype) -> Kernel | None:
    product = _product_of(layers[0])
    if product is None and len(layers) == 1 and type(layers[0]).__mro__[1:2] == (QuantizedLinear,):
        return layers[0].kernel()  # type: ignore[no-any-return, operator]
    if any(_product_of(layer) is not product for layer in layers):
        return None
    if not isinstance(product, JointProduct) or not product.consists_of(layers) or not product.takes(dtype):
        return None
    return product.kernel()


def _product_of(layer: nn.Module) -> object:
    """What computes a layer together with its siblings, if anything does."""
    return getattr(layer.__dict__.get("forward", layer), "product", None)
