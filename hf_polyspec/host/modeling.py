# SPDX-License-Identifier: Apache-2.0
"""What a model of one's own is built from, and where its files come from."""

from __future__ import annotations

from transformers import AutoModel, LlamaConfig
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache, DynamicLayer
from transformers.utils.generic import ModelOutput
from transformers.utils.hub import cached_file

__all__ = [
    "AutoModel",
    "Cache",
    "CacheLayerMixin",
    "DynamicCache",
    "DynamicLayer",
    "LlamaConfig",
    "ModelOutput",
    "cached_file",
]
