# SPDX-License-Identifier: Apache-2.0
"""The modules of a model: which can be quantised, how one takes another's place, and a copy that shares its memory."""

from __future__ import annotations

import copy
from typing import TypeVar, cast

from torch import nn

from hf_polyspec.host.release import without_compiled_forwards
from hf_polyspec.integers.foreign import stored_elsewhere
from hf_polyspec.integers.linear import QuantizedLinear

Model = TypeVar("Model", bound=nn.Module)


def is_linear(module: nn.Module) -> bool:
    """Whether a module can be quantised: an `nn.Linear`, transformers' `Conv1D`, or another library's linear layer."""
    if isinstance(module, QuantizedLinear):
        return False
    return type(module) is nn.Linear or type(module).__name__ == "Conv1D" or stored_elsewhere(module)


def sharing_copy(model: Model) -> Model:
    """A copy of a model's modules that shares the storage of every parameter and buffer.

    Each parameter is a new `nn.Parameter` over the same memory, so moving or casting the copy leaves the original
    alone; only writing into the tensors in place would be seen by both. Parameters of a class of their own, which
    libraries that quantise have, are copied.
    """
    memo: dict[int, object] = {}
    for parameter in model.parameters():
        if type(parameter) is nn.Parameter:
            memo[id(parameter)] = nn.Parameter(parameter.detach(), requires_grad=False)
    for buffer in model.buffers():
        memo[id(buffer)] = buffer.detach()
    return cast(Model, without_compiled_forwards(copy.deepcopy(model, memo)))


def output_head(model: nn.Module) -> nn.Module | None:
    """The layer that makes the logits, where the model names one."""
    getter = getattr(model, "get_output_embeddings", None)
    head = getter() if callable(getter) else None
    return head if isinstance(head, nn.Module) else None


def replace_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put `module` where `name` is."""
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)


def quantized_layers(model: nn.Module) -> dict[str, QuantizedLinear]:
    """The quantised layers of a model by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantizedLinear)}
