# SPDX-License-Identifier: Apache-2.0
"""What a model of one's own is built from, and where its files come from."""

from __future__ import annotations

from typing import Any

import transformers
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText, LlamaConfig
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache, DynamicLayer
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)
from transformers.utils.generic import ModelOutput
from transformers.utils.hub import cached_file

__all__ = [
    "CONFIG_MAPPING",
    "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES",
    "AutoModel",
    "AutoModelForCausalLM",
    "AutoModelForImageTextToText",
    "Cache",
    "CacheLayerMixin",
    "DynamicCache",
    "DynamicLayer",
    "LlamaConfig",
    "ModelOutput",
    "cached_file",
    "model_class",
]

_NAMES: tuple[tuple[Any, Any], ...] = (
    (AutoModelForCausalLM, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES),
    (AutoModelForImageTextToText, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES),
)


def model_class(auto: Any, model_type: str) -> Any:
    """The class that a mapping of transformers names for a type of config, the first where it names several.

    Args:
        auto: `AutoModelForCausalLM` or `AutoModelForImageTextToText`; model_type: as in `config.model_type`.
    """
    named = next(names for kind, names in _NAMES if kind is auto)[model_type]
    return getattr(transformers, named if isinstance(named, str) else named[0])
