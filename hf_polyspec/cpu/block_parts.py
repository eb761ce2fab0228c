# SPDX-License-Identifier: Apache-2.0
"""Which decoder layers have Llama's parts, and whether they still are what they were."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from hf_polyspec.cpu.compiled import DTYPES
from hf_polyspec.host.attention import attention_name
from hf_polyspec.host.hooks import CAPTURING
from hf_polyspec.host.walking import modules_of

_PARTS = {
    "": {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"},
    "self_attn": {"q_proj", "k_proj", "v_proj", "o_proj"},
    "mlp": {"gate_proj", "up_proj", "down_proj", "act_fn"},
}
_WANTED = ("head_dim", "scaling", "num_key_value_groups", "layer_idx", "config")
# Arguments of a block that change nothing here, and those that are None or False change nothing either.
_HARMLESS = {
    "cache_position",
    "input_ids",
    "logits_to_keep",
    "output_hidden_states",
    "position_ids",
    "return_dict",
    "use_cache",
}


def looks_like_llama(module: nn.Module) -> bool:
    """Whether a module has the parts of Llama's decoder layer, under its names and of sizes that fit together."""
    if not isinstance(module._modules, dict):
        return False  # a scripted one
    for name, parts in _PARTS.items():
        # Asked of every module of a model in every call of generate(): without torch's detours.
        part = module._modules.get(name) if name else module
        if part is None or part._modules.keys() != parts or None in part._modules.values():
            return False
    block: Any = module
    attention, norms = block.self_attn, (block.input_layernorm, block.post_attention_layernorm)
    own = any(parameter is not None for parameter in attention._parameters.values())
    if own or not all(hasattr(attention, name) for name in _WANTED):
        return False
    return _sizes_fit(block) and all(
        hasattr(norm, "variance_epsilon") and isinstance(norm.weight, nn.Parameter) and norm.weight.dtype in DTYPES
        for norm in norms
    )


def _sizes_fit(block: Any) -> bool:
    attention, mlp = block.self_attn, block.mlp
    size, groups = attention.head_dim, attention.num_key_value_groups
    layers = (
        *(attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj),
        *(mlp.gate_proj, mlp.up_proj, mlp.down_proj),
    )
    sizes = [(getattr(layer, "out_features", None), getattr(layer, "in_features", None)) for layer in layers]
    if not all(isinstance(one, int) for pair in sizes for one in pair):
        return False
    (queries, width), keys, values, output, gate, up, down = sizes
    return (
        keys == values == (keys[0], width)
        and keys[0] % size == 0
        and queries == keys[0] * groups
        and output == (width, queries)
        and gate == up == (down[1], width)
        and down[0] == width
    )


class BlockParts:
    """The parts of one decoder layer as they were found.

    Looked up once: `ready` makes sure that they are still there, and torch takes its time to find a module.

    Args:
        layer: See `looks_like_llama`.

    Attributes:
        layer: The layer itself.
        attention: The module; norms: before attention and before the gates.
        joint, output, gates, down: Layers that read the same input.
        places: Every module inside, with its parent's modules and its name among them.
        shapes: Outputs and inputs of every linear layer.
    """

    def __init__(self, layer: nn.Module) -> None:
        self.layer = layer
        block: Any = layer
        attention, mlp = block.self_attn, block.mlp
        self.attention: Any = attention
        self.norms = (block.input_layernorm, block.post_attention_layernorm)
        self.joint = (attention.q_proj, attention.k_proj, attention.v_proj)
        self.output, self.gates, self.down = (attention.o_proj,), (mlp.gate_proj, mlp.up_proj), (mlp.down_proj,)
        # A place that stands empty counts as changed: nobody would notice when it is filled.
        self.places: list[tuple[dict[str, Any], str, Any]] = [
            (parent._modules, name, child) for parent in layer.modules() for name, child in parent._modules.items()
        ]

        groups = (*self.joint, *self.output, *self.gates, *self.down)
        self.shapes = [(linear, (int(linear.out_features), int(linear.in_features))) for linear in groups]

    def in_place(self) -> bool:
        """Whether every module inside is the one that was found."""
        return all(siblings.get(name) is module for siblings, name, module in self.places)

    def ready(self, x: Tensor, kwargs: dict[str, Any]) -> bool:
        """Whether nobody has put anything into the layer, or asks for anything, that a fused block would pass over."""
        attention = self.attention
        return (
            not self.layer.training
            and self._untouched()
            and attention.is_causal
            and attention_name(attention.config) == "sdpa"
            and all(_is_shaped(linear, shape) for linear, shape in self.shapes)
            and all(not matters(name, value) for name, value in kwargs.items())
            and all(fits(norm.weight, x) for norm in self.norms)
        )

    def _untouched(self) -> bool:
        if global_hooks():
            return False
        for siblings, name, module in self.places:
            if siblings.get(name) is not module or module is None:
                return False
            own = module.__dict__
            forward = own.get("forward")  # read once: in another thread it may be taken away
            if forward is not None and not hasattr(forward, "product"):
                return False
            if has_hooks(module):
                return False
        return True


def _is_shaped(linear: nn.Module, shape: tuple[int, int]) -> bool:
    """Whether the float weight of a layer has the shape it was found with; what libraries pack has another one."""
    weight = linear._parameters.get("weight")
    return type(weight) is not nn.Parameter or weight.shape == shape


def hooked(layer: nn.Module) -> bool:
    """Whether anybody would notice that a layer is tried out."""
    return global_hooks() or any(map(has_hooks, modules_of(layer)))


def has_hooks(module: nn.Module) -> bool:
    """Whether a module has hooks of somebody's. With sdpa there is nothing that the host's own collect of attention."""
    own = module.__dict__  # asked for in every pass: without the detour through `nn.Module.__getattr__`
    behind, before = own["_forward_hooks"], own["_forward_pre_hooks"]
    if not behind and not before:
        return False
    return any(getattr(hook, "__module__", "") != CAPTURING for hooks in (behind, before) for hook in hooks.values())


def global_hooks() -> bool:
    """Whether there are hooks that torch calls for every module."""
    return bool(nn.modules.module._has_any_global_hook())  # type: ignore[no-untyped-call]


def matters(name: str, value: Any) -> bool:
    """Whether an argument of a block asks for something that the fused way does not know."""
    if value is None or name in _HARMLESS:
        return False
    return value is not False or name == "is_causal"


def fits(weight: Tensor, x: Tensor) -> bool:
    """Whether the weight of a norm is read as numbers of x's dtype and width."""
    alike = type(weight) is nn.Parameter and weight.dtype is x.dtype and weight.device.type == "cpu"
    return alike and weight.is_contiguous() and weight.numel() == x.shape[-1]


def readable_mask(mask: Tensor | None, x: Tensor) -> bool:
    """Whether a mask is one for all heads, `[B or 1, 1, F, S]`, bool or added."""
    return mask is None or (
        isinstance(mask, Tensor)
        and mask.dim() == 4
        and mask.shape[0] in (1, x.shape[0])
        and mask.shape[1] == 1
        and mask.shape[2] == x.shape[1]
        and (mask.dtype is torch.bool or mask.dtype.is_floating_point)
    )


def readable_turns(turns: Any, x: Tensor, size: int) -> bool:
    """Whether cosines and sines are `[B or 1, F, D]`, for whole heads."""
    return (
        isinstance(turns, tuple)
        and len(turns) == 2
        and all(isinstance(turn, Tensor) and turn.dim() == 3 for turn in turns)
        and turns[0].shape == turns[1].shape
        and turns[0].shape[0] in (1, x.shape[0])
        and turns[0].shape[1:] == (x.shape[1], size)
    )


def plain_turns(turns: tuple[Tensor, Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines as the compiled functions read them: contiguous, of x's dtype."""
    cos, sin = turns
    return cos.to(x.dtype).contiguous(), sin.to(x.dtype).contiguous()
