# SPDX-License-Identifier: Apache-2.0
"""transformers' registry of quantisation methods."""

from __future__ import annotations

from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

__all__ = ["HfQuantizer", "QuantizationConfigMixin", "register_quantization_config", "register_quantizer"]
