# SPDX-License-Identifier: Apache-2.0
"""transformers' registry of quantisation methods."""

from __future__ import annotations

from typing import Any

from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

__all__ = ["HfQuantizer", "QuantizationConfigMixin", "claim", "register_quantization_config", "register_quantizer"]

_MARKS = (
    *("is_loaded_in_4bit", "is_loaded_in_8bit", "is_4bit_serializable", "is_8bit_serializable"),
    *("is_quantized", "quantization_method"),
)


def claim(model: Any, quantizer: HfQuantizer) -> None:
    """Let a quantizer say how a model is saved, and forget which one quantised what it was made of."""
    for mark in _MARKS:
        model.__dict__.pop(mark, None)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.hf_quantizer = quantizer
