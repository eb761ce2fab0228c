# SPDX-License-Identifier: Apache-2.0
"""Whether a quantised copy of a model is to be made at all: memory, and the time that it takes."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import nn

from ..cpu.memory import memory, spare
from ..host.ranks import own_part
from ..host.release import is_compiled
from ..integers.weights import round_to_nearest
from ..quantization.model import linear_layers
from ..quantization.modules import quantized_layers

MOST_SECONDS = 20.0
"""A copy that takes longer to make is left to those who ask for it by name."""
_ROWS = 64


def copy_hindrance(model: nn.Module, bits: int) -> str | None:
    """Why no copy of so many bits is made of a model; None if one is."""
    if is_compiled(model):
        return "the model is compiled"
    if quantized_layers(model) or getattr(model, "is_quantized", False):
        return "the model is quantised itself"
    weights: list[Any] = [layer.weight for layer in linear_layers(model).values()]
    if not weights or any(weight.is_meta for weight in weights):
        return "there are no matrices in memory to round"
    needed = sum(weight.numel() for weight in weights) * bits // 8
    if needed > _free(weights[0].device):
        return f"{needed / 1e6:,.0f} MB of memory are not free"
    seconds = _rounding_seconds(weights, bits)
    if seconds > MOST_SECONDS:
        return f'making it takes about {seconds:,.0f} s; name it to have it, assistant_models=["int{bits}", "suffix"]'
    return None


def _free(device: torch.device) -> int:
    if device.type == "cpu":
        return memory().available - spare()
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0]) // 2
    return 0


def _rounding_seconds(weights: list[Any], bits: int) -> float:
    """How long all take, from a piece of the largest."""
    piece = own_part(max(weights, key=lambda weight: weight.numel()).detach())[:_ROWS]
    began = time.perf_counter()
    round_to_nearest(piece, bits, -1 if bits == 8 else 32, True)
    whole = sum(int(weight.numel()) for weight in weights)
    return (time.perf_counter() - began) * whole / max(1, int(piece.numel()))
