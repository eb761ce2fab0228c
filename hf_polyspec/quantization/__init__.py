# SPDX-License-Identifier: Apache-2.0
"""Quantised and packed models: cheaper levels for a chain, and the checkpoints they are kept in."""

from hf_polyspec.cpu.packing import is_packed, pack, unpack
from hf_polyspec.integers.linear import QuantizedLinear
from hf_polyspec.integers.weights import QuantizedWeight, round_to_nearest
from hf_polyspec.quantization.awq import fold_scales
from hf_polyspec.quantization.bridge import PolySpecQuantizer
from hf_polyspec.quantization.calibrate import choose_layer_bits, input_moments, sensitivity
from hf_polyspec.quantization.checkpoint import load_quantized, save_quantized
from hf_polyspec.quantization.config import PolySpecQuantizationConfig
from hf_polyspec.quantization.libraries import quantize_with_library
from hf_polyspec.quantization.linear import Int4Linear, Int8Linear
from hf_polyspec.quantization.measure import Comparison, SpeedRatio, agreement, compare, speed_ratios
from hf_polyspec.quantization.mixed import MixedBits, bits_for_agreement
from hf_polyspec.quantization.model import quantize_model
from hf_polyspec.quantization.recovery import Recovery, RecoveryOptions, recover

__all__ = [
    "Comparison",
    "Int4Linear",
    "Int8Linear",
    "MixedBits",
    "PolySpecQuantizationConfig",
    "PolySpecQuantizer",
    "QuantizedLinear",
    "QuantizedWeight",
    "Recovery",
    "RecoveryOptions",
    "SpeedRatio",
    "agreement",
    "bits_for_agreement",
    "choose_layer_bits",
    "compare",
    "fold_scales",
    "input_moments",
    "is_packed",
    "load_quantized",
    "pack",
    "quantize_model",
    "quantize_with_library",
    "recover",
    "round_to_nearest",
    "save_quantized",
    "sensitivity",
    "speed_ratios",
    "unpack",
]
