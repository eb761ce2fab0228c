# SPDX-License-Identifier: Apache-2.0
"""Which blocks of a model are fused: those that look like Llama's and give the same numbers when tried."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from hf_polyspec.cpu.block_parts import hooked, looks_like_llama
from hf_polyspec.cpu.compiled import compiles
from hf_polyspec.cpu.fused_block import FusedBlock
from hf_polyspec.host.walking import modules_of

# Blocks that turned out to be, or not to be, what they look like.
_TRIED: WeakKeyDictionary[nn.Module, tuple[object, bool]] = WeakKeyDictionary()
# By model, which its layers do not refer to: what would be kept by layer would keep the layer.
_FUSED: WeakKeyDictionary[nn.Module, dict[nn.Module, FusedBlock]] = WeakKeyDictionary()


def fused_blocks(model: nn.Module) -> list[FusedBlock]:
    """What takes the place of a model's decoder layers, see `fusable`.

    Kept from call to call as long as the layers stay what they are: blocks that know each other need not meet again.
    """
    before = _FUSED.get(model, {})
    found: dict[nn.Module, FusedBlock] = {}
    for layer in fusable(model):
        known = before.get(layer)
        found[layer] = known if known is not None and known.parts.in_place() else FusedBlock(layer)
    if found:  # nothing is where another call is using the blocks that are kept
        _FUSED[model] = found
    return list(found.values())


def fusable(model: nn.Module) -> Iterator[nn.Module]:
    """The decoder layers of a model that can be fused, of those whose `forward` nobody has replaced.

    A layer with hooks is passed over, since trying it would call them.
    """
    if not compiles():
        return
    for module in modules_of(model):
        plain = "forward" not in module.__dict__ and looks_like_llama(module)
        if plain and _on_cpu(module) and not hooked(module) and _computes_alike(module):
            yield module


def _on_cpu(module: nn.Module) -> bool:
    return all(
        tensor is None or tensor.device.type == "cpu"
        for part in module.modules()
        for tensors in (part._parameters, part._buffers)
        for tensor in tensors.values()
    )


def _computes_alike(layer: nn.Module) -> bool:
    """Whether both ways give the same numbers; tried once for a layer as it is."""
    mark = _mark(layer)
    known = _TRIED.get(layer)
    if known is None or known[0] != mark:
        known = _TRIED[layer] = mark, _try(layer)
    return known[1]


def _mark(layer: Any) -> object:
    """What a block's way of computing depends on, besides the numbers of its matrices."""
    kinds = tuple(type(module) for module in layer.modules())
    settings = tuple(
        (name, value)
        for module in (layer, layer.self_attn, layer.mlp)
        for name, value in module.__dict__.items()
        if isinstance(value, (int, float)) and name != "training"
    )
    weight = layer.input_layernorm.weight
    return (weight.data_ptr(), weight.dtype, kinds, settings)


@torch.no_grad()
def _try(layer: nn.Module) -> bool:
    """Whether the compiled steps and the layer's own operations agree on three made-up positions, within rounding."""
    block: Any = layer
    weight = block.input_layernorm.weight
    generator = torch.Generator().manual_seed(0)
    # Small, so that what the block adds is not lost in the rounding of what it is added to.
    x = torch.randn(1, 3, weight.shape[0], generator=generator, device="cpu").mul(0.01).to(weight.dtype)
    angles = torch.randn(1, 3, block.self_attn.head_dim, generator=generator, device="cpu")
    turns = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    modes = [(module, module.training) for module in layer.modules()]
    layer.eval()
    try:
        plain = type(block).forward(block, x, position_embeddings=turns)
        fused = FusedBlock(layer).compute(x, None, None, turns)
        added = (plain - x).double()
        off = (fused - plain).double().norm() / added.norm()
        return bool(off <= max(8 * torch.finfo(x.dtype).eps, 1e-4))
    except Exception:
        # A block that only looks like one of these may fail in any way; it is left as it is.
        return False
    finally:
        for module, mode in modes:
            module.training = mode
