# SPDX-License-Identifier: Apache-2.0
"""What a user should know of how a model is multiplied here: sentences for statistics and for `polyspec inspect`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from hf_polyspec.cpu.by_rows import ByRows
from hf_polyspec.cpu.float_kernels import packed_bytes, packs
from hf_polyspec.cpu.memory import memory, spare
from hf_polyspec.cpu.packing import PackedForward
from hf_polyspec.cpu.shortage import Shortage, megabytes
from hf_polyspec.host.walking import modules_of
from hf_polyspec.integers.linear import QuantizedLinear


def notes(model: nn.Module) -> list[str]:
    """Sentences about a model that has run."""
    if not (Shortage.ever or ByRows.ever):
        return []  # asked after every call
    modules = modules_of(model)
    return [note for note in (_unpacked(modules), _by_rows(modules)) if note is not None]


def _unpacked(modules: Sequence[nn.Module]) -> str | None:
    forwards = [module.__dict__.get("forward") for module in modules]
    products = {id(one.product): one.product for one in forwards if isinstance(one, PackedForward)}
    lacking = [product.lacks for product in products.values() if product.lacks]
    if not lacking:
        return None
    return (
        f"{len(lacking)} of {len(products)} matrices are not packed: memory is short, the largest of them needs "
        f"{megabytes(max(lacking))}; they are multiplied as without packing until there is memory again"
    )


def _by_rows(modules: Sequence[nn.Module]) -> str | None:
    kinds = {kind for kind in set(map(type, modules)) if issubclass(kind, QuantizedLinear)}
    layers: list[Any] = [module for module in modules if type(module) in kinds] if kinds else []
    changing = [layer for layer in layers if isinstance(layer.built, ByRows)]
    if not changing:
        return None
    bits = " and ".join(str(width) for width in sorted({layer.bits for layer in changing}))
    return (
        f"{len(changing)} layers of {bits} bits have one kernel for few rows and another for many here: what a token "
        "gets depends on how many are read with it, in float32 by the rounding of bfloat16, and greedy text may differ "
        "from plain generate()'s"
    )


def packing_here(model: nn.Module, dtype: torch.dtype) -> str | None:
    """What `pack` would need on this machine; None if there is nothing to pack.

    Args:
        model: Its weights need not be in memory.
        dtype: They would be loaded in.
    """
    with torch.device("cpu"):
        kind = torch.empty(1, 1, dtype=dtype)
    weights = [module.weight for module in model.modules() if type(module) is nn.Linear]
    if not weights or not packs(kind):
        return None
    size = sum(packed_bytes(weight.shape, dtype) for weight in weights)
    own = sum(parameter.numel() for parameter in model.parameters()) * kind.element_size()
    seen = memory()
    fits = "fits" if own + size < seen.available - spare() else "some matrices would stay unpacked, which is slower"
    return f"{megabytes(size)} beside the weights' {megabytes(own)}, {megabytes(seen.available)} are available: {fits}"
