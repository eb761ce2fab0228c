# SPDX-License-Identifier: Apache-2.0
"""Tiny packed models of the kinds whose passes may say nothing but the likeliest ids."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from transformers import PreTrainedModel

from hf_polyspec.cpu.packing import pack
from hf_polyspec.quantization import quantize_model

Tiny = Callable[..., PreTrainedModel]


def packed(tiny: Tiny, family: str = "llama", dtype: torch.dtype = torch.float32, **settings: Any) -> Any:
    return pack(copy.deepcopy(tiny(family, num_hidden_layers=3, **settings)).eval().to(dtype))


MODELS: dict[str, Callable[[Tiny], Any]] = {
    "llama": packed,
    "bfloat16": lambda tiny: packed(tiny, dtype=torch.bfloat16),
    "float16": lambda tiny: packed(tiny, dtype=torch.float16),
    "qwen2, tied": lambda tiny: packed(tiny, "qwen2", tie_word_embeddings=True),
    "4 bits": lambda tiny: pack(quantize_model(copy.deepcopy(tiny(num_hidden_layers=3)), bits=4)),
}
