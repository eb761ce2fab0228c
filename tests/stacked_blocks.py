# SPDX-License-Identifier: Apache-2.0
"""Packed models whose blocks are computed together, and passes through them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_polyspec.cpu.block_products import block_products
from hf_polyspec.host.cache import RollbackCache
from hf_polyspec.host.release import GENERATION_CACHE
from hf_polyspec.quantization import pack, quantize_model

Tiny = Callable[..., PreTrainedModel]
DEPTH = 5
IDS = torch.randint(3, 48, (3, 120), generator=torch.Generator().manual_seed(5))


def packed_model(tiny: Tiny, form: str = "float32", family: str = "llama", depth: int = DEPTH) -> PreTrainedModel:
    form, *wide = form.split(", ")  # heads that are multiplied in tiles where the CPU has them
    model = copy.deepcopy(
        tiny(family, initializer_range=0.1, num_hidden_layers=depth, **({"head_dim": 32} if wide else {}))
    )
    kind, _, dtype = form.partition(" ")
    if kind == "int8":
        model = quantize_model(model, 8)
    model = pack(model.to(getattr(torch, (dtype or "float32") if kind == "int8" else kind)))
    if not _fuses(model):
        pytest.skip("this CPU has no dot products of bytes")
    return model


def _fuses(model: PreTrainedModel) -> bool:
    """Whether blocks with this model's matrices are tasks at all."""
    return block_products(model.model.layers[0].forward.parts, model.dtype) is not None


@torch.no_grad()
def run(model: nn.Module, ids: Tensor, cache: RollbackCache, **given: Any) -> Tensor:
    logits: Tensor = model(ids, **{GENERATION_CACHE: cache}, **given).logits
    return logits


@torch.no_grad()
def passes(model: nn.Module, rows: int = 1, mask: Tensor | None = None) -> tuple[list[Tensor], RollbackCache]:
    """Passes of several lengths with a cache that grows past its room and shrinks: logits of each, and the cache."""
    cache, found = RollbackCache(), []
    for start, end in [(0, 40), (40, 41), (41, 49), (45, 46), (46, 56), (50, 51), (51, 59), (59, 67), (60, 70)]:
        cache.shrink(start)
        seen = None if mask is None else mask[:rows, :end]
        places = torch.arange(start, end)[None].expand(rows, -1)
        found.append(run(model, IDS[:rows, start:end], cache, attention_mask=seen, position_ids=places))
    return found, cache


def together(tasks: list[int], depth: int = DEPTH) -> None:
    """All passes but the first, whose cache does not tell yet how deep the model is, were one task."""
    assert tasks[:depth] == [1] * depth
    assert set(tasks[depth:]) == {depth}


def same(found: tuple[list[Tensor], RollbackCache], wanted: tuple[list[Tensor], RollbackCache]) -> None:
    for one, other in zip(found[0], wanted[0], strict=True):
        assert torch.equal(one, other)
    assert found[1].length == wanted[1].length
    for held, kept in zip(found[1].layers, wanted[1].layers, strict=True):
        assert torch.equal(held.keys, kept.keys)
        assert torch.equal(held.values, kept.values)


def learned(model: nn.Module, rows: int = 1) -> RollbackCache:
    """A cache of 40 columns, with the blocks knowing each other."""
    cache = RollbackCache()
    for end in (40, 41):
        run(model, IDS[:rows, cache.length : end], cache)
    cache.shrink(40)
    return cache
