# SPDX-License-Identifier: Apache-2.0
"""A quantised output layer that was rounded from the embeddings it is tied to: checkpoints hold the embeddings alone.

Small models tie the two, and the matrix is most of their weights: kept as embeddings and as a rounded head it makes a
checkpoint of 8 bits larger than its original in 16. Rounding to the nearest code is a function of the matrix, so the
head is made anew from the embeddings when the checkpoint is loaded, bit for bit. Loaders that do not know the setting
`tied_head` find a float head tied to the embeddings, which is what the original had.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hf_polyspec.host.tying import untie
from hf_polyspec.integers.linear import QuantizedLinear
from hf_polyspec.integers.weights import QuantizedWeight, round_to_nearest
from hf_polyspec.quantization.linear import quantized_linear
from hf_polyspec.quantization.modules import output_head, replace_module
from hf_polyspec.storage.checkpoints import REMEDY
from hf_polyspec.storage.reading import read_state, reading

SETTING = "tied_head"


@torch.no_grad()
def tied_head(model: nn.Module) -> tuple[str, dict[str, Any]] | None:
    """The name of a quantised head that rounding the embeddings gives, and how they are rounded; None if none does.

    Args:
        model: A causal LM whose head may be quantised; whether its config calls the two tied does not count.
    """
    head, embeddings = output_head(model), _embeddings(model)
    if not isinstance(head, QuantizedLinear) or head.bias is not None or embeddings is None:
        return None
    matrix = embeddings[1]
    if tuple(matrix.shape) != (head.out_features, head.in_features) or matrix.is_meta:
        return None
    kept = head.quantized_weight()
    for symmetric in (True, False):
        if _same(round_to_nearest(matrix, head.bits, head.group_size, symmetric), kept):
            name = next(name for name, module in model.named_modules() if module is head)
            return name, {"bits": head.bits, "group_size": head.group_size, "sym": symmetric}
    return None


@torch.no_grad()
def restore_head(model: nn.Module, how: dict[str, Any], files: Sequence[str]) -> None:
    """Put the quantised head of a loaded checkpoint in the place of the tied one.

    Args:
        model: With its weights loaded.
        how: From `tied_head`.
        files: Of the checkpoint: the embeddings are rounded in the type they were stored in, whatever type the model
            was loaded with.

    Raises:
        ValueError: The model has no embeddings or no head.
    """
    head, embeddings = output_head(model), _embeddings(model)
    if head is None or embeddings is None:
        raise ValueError(f"The checkpoint ties a quantised head to embeddings, which {type(model).__name__} has not.")
    name = next(name for name, module in model.named_modules() if module is head)
    parameter, loaded = embeddings
    stored = _stored(parameter, files)
    matrix = loaded if stored is None else stored.to(loaded.device)
    rounded = round_to_nearest(matrix, int(how["bits"]), int(how["group_size"]), bool(how["sym"]))
    replace_module(model, name, quantized_linear(rounded))
    untie(model, [name])


def _embeddings(model: nn.Module) -> tuple[str, Tensor] | None:
    """Name and matrix of the input embeddings."""
    getter = getattr(model, "get_input_embeddings", None)
    found = getter() if callable(getter) else None
    weight = getattr(found, "weight", None)
    if not isinstance(weight, Tensor):
        return None
    name = next(name for name, module in model.named_modules() if module is found)
    return f"{name}.weight", weight.detach()


def _same(one: QuantizedWeight, other: QuantizedWeight) -> bool:
    """Whether two matrices are one in a checkpoint, whose scales have 16 bits."""
    return (
        torch.equal(one.codes, other.codes)
        and torch.equal(one.scales.to(torch.float16), other.scales.to(torch.float16))
        and torch.equal(one.zeros.long(), other.zeros.long())
        and torch.equal(one.g_idx.long(), other.g_idx.long())
    )


def _stored(name: str, files: Sequence[str]) -> Tensor | None:
    """The embeddings as the checkpoint has them; names of bare models lack (or add) a prefix."""
    from safetensors import safe_open

    for path in files:
        if not str(path).endswith(".safetensors"):
            state = read_state(path, REMEDY)
            found = _matching(name, list(state))
            if found is not None:
                return torch.as_tensor(state[found])
            continue
        with reading(path, REMEDY), safe_open(path, framework="pt") as handle:
            found = _matching(name, list(handle.keys()))
            if found is not None:
                return torch.as_tensor(handle.get_tensor(found))
    return None


def _matching(name: str, keys: Sequence[str]) -> str | None:
    return next((key for key in keys if key == name or name.endswith(f".{key}") or key.endswith(f".{name}")), None)
