# SPDX-License-Identifier: Apache-2.0
"""EAGLE draft heads: the model, its checkpoint formats, its training."""

from __future__ import annotations

from hf_polyspec.eagle.configuration import EagleHeadConfig
from hf_polyspec.eagle.features import bind, feature_layers, select_features, target_parts
from hf_polyspec.eagle.formats.export import export_head, export_official, export_speculators
from hf_polyspec.eagle.formats.loading import load_head
from hf_polyspec.eagle.fresh import init_for
from hf_polyspec.eagle.head_cache import HeadCache
from hf_polyspec.eagle.modeling import EagleHead, EagleHeadOutput
from hf_polyspec.eagle.vocabulary import VocabularySlice

__all__ = [
    "EagleHead",
    "EagleHeadConfig",
    "EagleHeadOutput",
    "HeadCache",
    "VocabularySlice",
    "bind",
    "export_head",
    "export_official",
    "export_speculators",
    "feature_layers",
    "init_for",
    "select_features",
    "target_parts",
]

# What a head is does not depend on the files it may come from: the two meet here.
EagleHead.read_by(load_head)
