# SPDX-License-Identifier: Apache-2.0
"""Quantised and packed models: cheaper levels for a chain, and the checkpoints they are kept in."""

from hf_polyspec.quantization.linear import Int4Linear, Int8Linear, QuantizedLinear
from hf_polyspec.quantization.model import quantize_model
from hf_polyspec.quantization.weights import QuantizedWeight, round_to_nearest

__all__ = [
    "Int4Linear",
    "Int8Linear",
    "QuantizedLinear",
    "QuantizedWeight",
    "quantize_model",
    "round_to_nearest",
]
