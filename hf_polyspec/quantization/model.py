# SPDX-License-Identifier: Apache-2.0
"""Quantised copies of whole models, made without changing the model they are made from."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import nn

from hf_polyspec.quantization.gptq_format import storable
from hf_polyspec.quantization.linear import Int4Linear, Int8Linear, QuantizedLinear, float_weight

ModuleFilter = Callable[[str, nn.Module], bool]


def is_linear(module: nn.Module) -> bool:
    """Whether a module is a float linear layer that can be quantised (`nn.Linear` or transformers' `Conv1D`)."""
    return type(module) is nn.Linear or type(module).__name__ == "Conv1D"


def sharing_copy(model: nn.Module) -> nn.Module:
    """A copy of a model's modules that shares the storage of every parameter and buffer.

    Each parameter is a new `nn.Parameter` over the same memory, so moving or casting the copy leaves the original
    alone; only writing into the tensors in place would be seen by both.
    """
    memo: dict[int, object] = {}
    for parameter in model.parameters():
        memo[id(parameter)] = nn.Parameter(parameter.detach(), requires_grad=False)
    for buffer in model.buffers():
        memo[id(buffer)] = buffer.detach()
    return copy.deepcopy(model, memo)


def output_head(model: nn.Module) -> nn.Module | None:
    """The layer that makes the logits, where the model names one."""
    getter = getattr(model, "get_output_embeddings", None)
    head = getter() if callable(getter) else None
    return head if isinstance(head, nn.Module) else None


def replace_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put `module` where `name` is."""
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)


@torch.no_grad()
def quantize_model(
    model: nn.Module,
    bits: int = 8,
    group_size: int = 128,
    *,
    symmetric: bool = False,
    modules: ModuleFilter | None = None,
    head_bits: int | None = 8,
) -> nn.Module:
    """A copy of a model whose linear layers compute with integer weights: the middle of a chain.

    The model itself is left as it is. Everything that is not a quantised linear layer (embeddings, norms) shares its
    memory with the model.

    Args:
        model: Any model in float32, bfloat16 or float16.
        bits: Bits a weight, 8 (one scale a row) or 4 (a scale and a zero a group).
        group_size: Inputs that share a scale at 4 bits.
        symmetric: Store no zeros at 4 bits.
        modules: `(name, module) -> bool`, which linear layers to quantise; all by default.
        head_bits: Bits of the layer that makes the logits, None to leave it in float.

    Returns:
        The quantised copy, in eval mode.

    Raises:
        ValueError: Unsupported bits, or no layer could be quantised.
    """
    if bits not in (4, 8) or head_bits not in (None, 4, 8):
        raise ValueError(f"bits={bits} and head_bits={head_bits} must be 4 or 8 (head_bits may be None).")
    head = output_head(model)
    chosen: dict[str, QuantizedLinear] = {}
    for name, module in model.named_modules():
        if not is_linear(module) or (modules is not None and not modules(name, module)):
            continue
        width = head_bits if module is head else bits
        weight, _ = float_weight(module)
        if width is None or not storable((weight.shape[0], weight.shape[1]), width):
            continue
        if width == 8:
            chosen[name] = Int8Linear.from_linear(module)
        else:
            chosen[name] = Int4Linear.from_linear(module, width, group_size, symmetric)
    if not chosen:
        raise ValueError(f"{type(model).__name__} has no linear layer that could be quantised to {bits} bits.")
    quantized = sharing_copy(model)
    for name, layer in chosen.items():
        replace_module(quantized, name, layer)
    return quantized.eval()
