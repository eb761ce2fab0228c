# SPDX-License-Identifier: Apache-2.0
"""Decoder blocks of few rows in a dozen calls instead of a hundred.

On a small model a pass over a handful of tokens spends more time between its matrix products than in them. Blocks of
the kind that Llama, Mistral, Qwen2 and their kin have are computed here by compiled steps (see `compiled.blocks` and
`compiled.attention`) that round where the block's own operations round. What a block is, is found out by looking and
then by trying: it is fused only if both ways give the same numbers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from hf_polyspec.compiled import compiles
from hf_polyspec.quantization.by_rows import Kernel
from hf_polyspec.quantization.joint_product import JointProduct

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_PARTS = {
    "": {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"},
    "self_attn": {"q_proj", "k_proj", "v_proj", "o_proj"},
    "mlp": {"gate_proj", "up_proj", "down_proj", "act_fn"},
}
_HARMLESS = {"cache_position", "input_ids", "position_ids"}
"""Tensors among a block's further arguments that change nothing."""

# Blocks that turned out to be, or not to be, what they look like; by the place of their weights.
_TRIED: WeakKeyDictionary[nn.Module, tuple[object, bool]] = WeakKeyDictionary()


class FusedBlock:
    """Takes the place of one decoder layer's `forward`; the layer and everything inside stay what they are.

    Args:
        layer: See `fusable`.
    """

    def __init__(self, layer: nn.Module) -> None:
        self.layer = layer
        self._inside = [module for module in layer.modules() if module is not layer]

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
        if (
            args
            or position_embeddings is None
            or not self._applies(hidden_states, kwargs)
            or not _readable_mask(attention_mask, hidden_states)
        ):
            given = {"past_key_values": past_key_values, "position_embeddings": position_embeddings}
            return type(layer).forward(layer, hidden_states, attention_mask, *args, **given, **kwargs)
        return self.compute(hidden_states.contiguous(), attention_mask, past_key_values, position_embeddings)

    def _applies(self, x: Tensor, kwargs: dict[str, Any]) -> bool:
        from hf_polyspec.compiled.product import ROWS

        layer: Any = self.layer
        few = x.dim() == 3 and x.shape[0] * x.shape[1] <= ROWS
        return (
            few
            and x.device.type == "cpu"
            and x.dtype in _DTYPES
            and not torch.is_grad_enabled()
            and not torch.is_autocast_enabled("cpu")
            and not layer.training
            and layer.self_attn.config._attn_implementation == "sdpa"
            and not kwargs.get("output_attentions")
            and not any(isinstance(value, Tensor) and name not in _HARMLESS for name, value in kwargs.items())
            and not any(part._forward_hooks or part._forward_pre_hooks for part in self._inside)
        )

    def compute(self, x: Tensor, mask: Tensor | None, past: Any, turns: tuple[Tensor, Tensor]) -> Tensor:
        """The block's output `[B, F, H]`.

        Args:
            x: `[B, F, H]`; mask: as for torch's scaled_dot_product_attention; past: a cache or None.
            turns: cosines and sines `[B or 1, F, D]`.
        """
        from hf_polyspec.compiled.blocks import gated, rms_norm, rotate

        layer: Any = self.layer
        attention, mlp = layer.self_attn, layer.mlp
        first, second = layer.input_layernorm, layer.post_attention_layernorm
        y, _ = rms_norm(x, first.weight, first.variance_epsilon)
        joint = joint_output((attention.q_proj, attention.k_proj, attention.v_proj), y)
        cos, sin = (turn.to(x.dtype).contiguous() for turn in turns)
        shared = attention.k_proj.out_features // attention.head_dim
        heads = shared * attention.num_key_value_groups
        queries, keys, values = rotate(joint, cos, sin, heads, shared)
        if past is not None:
            keys, values = past.update(keys, values, attention.layer_idx)
        update = attention.o_proj(_attention(attention, queries, keys, values, mask))
        y, x = rms_norm(x, second.weight, second.variance_epsilon, update)
        update = mlp.down_proj(gated(joint_output((mlp.gate_proj, mlp.up_proj), y)))
        total: Tensor = x + update
        return total


def _attention(module: Any, queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
    from hf_polyspec.compiled.attention import attend, readable

    alike = keys.dtype is queries.dtype and values.stride() == keys.stride()
    if alike and readable(keys) and (mask is None or mask.shape[3] == keys.shape[2]):
        return attend(queries, keys, values, mask, module.scaling)
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    plain = ALL_ATTENTION_FUNCTIONS["sdpa"]
    out: Tensor = plain(module, queries, keys, values, mask, scaling=module.scaling)[0]
    return out.reshape(out.shape[0], out.shape[1], -1)


def _readable_mask(mask: Tensor | None, x: Tensor) -> bool:
    return mask is None or (
        isinstance(mask, Tensor)
        and mask.dim() == 4
        and mask.shape[0] in (1, x.shape[0])
        and mask.shape[1] == 1
        and mask.shape[2] == x.shape[1]
        and (mask.dtype is torch.bool or mask.dtype.is_floating_point)
    )


def joint_output(layers: Sequence[nn.Module], x: Tensor) -> Tensor:
    """The outputs of layers that read `x`, side by side, from one product where they have one."""
    kernel = _joint_kernel(layers, x)
    return torch.cat([layer(x) for layer in layers], -1) if kernel is None else kernel(x)


def _joint_kernel(layers: Sequence[nn.Module], x: Tensor) -> Kernel | None:
    product = getattr(layers[0].__dict__.get("forward", layers[0]), "product", None)
    if not isinstance(product, JointProduct) or not product.consists_of(layers) or not product.takes(x):
        return None
    return product.kernel()


def fusable(model: nn.Module) -> Iterator[nn.Module]:
    """Blocks that can be fused: Llama's parts under Llama's names, and the same numbers when tried."""
    if not compiles():
        return
    for module in model.modules():
        if _looks_like_llama(module) and "forward" not in module.__dict__ and _computes_alike(module):
            yield module


def _looks_like_llama(module: nn.Module) -> bool:
    for name, parts in _PARTS.items():
        part = getattr(module, name, None) if name else module
        if not isinstance(part, nn.Module) or {child for child, _ in part.named_children()} != parts:
            return False
    block: Any = module
    attention, norms = block.self_attn, (block.input_layernorm, block.post_attention_layernorm)
    wanted = ("head_dim", "scaling", "num_key_value_groups", "layer_idx", "config")
    return (
        all(hasattr(attention, name) for name in wanted)
        and getattr(attention, "is_causal", False)
        and isinstance(getattr(attention.k_proj, "out_features", None), int)
        and all(hasattr(norm, "variance_epsilon") and isinstance(norm.weight, nn.Parameter) for norm in norms)
        and all(norm.weight.device.type == "cpu" and norm.weight.dtype in _DTYPES for norm in norms)
    )


@torch.no_grad()
def _computes_alike(layer: nn.Module) -> bool:
    """Whether the compiled steps and the layer's own operations agree on three made-up positions, within rounding."""
    block: Any = layer
    weight = block.input_layernorm.weight
    mark = (weight.data_ptr(), weight.dtype, type(block.self_attn.q_proj))
    known = _TRIED.get(layer)
    if known is not None and known[0] == mark:
        return known[1]
    generator = torch.Generator().manual_seed(0)
    # Small, so that what the block adds is not lost in the rounding of what it is added to.
    x = torch.randn(1, 3, weight.shape[0], generator=generator).mul(0.01).to(weight.dtype)
    angles = torch.randn(1, 3, block.self_attn.head_dim, generator=generator)
    turns = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    training = layer.training
    layer.eval()
    try:
        plain = type(block).forward(block, x, position_embeddings=turns)
        fused = FusedBlock(layer).compute(x, None, None, turns)
        added = (plain - x).double()
        off = (fused - plain).double().norm() / added.norm()
        alike = bool(off <= max(8 * torch.finfo(x.dtype).eps, 1e-4))
    except Exception:
        # A block that only looks like one of these may fail in any way; it is left as it is.
        alike = False
    finally:
        layer.train(training)
    _TRIED[layer] = (mark, alike)
    return alike
