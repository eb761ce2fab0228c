# SPDX-License-Identifier: Apache-2.0
"""Tiny random models that draft beside another one."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.models.muse_glimmer_assistant import MuseGlimmerAssistantConfig, MuseGlimmerAssistantModel


def with_weights(model: PreTrainedModel, seed: int = 1) -> PreTrainedModel:
    """In eval mode, with matrices large enough that what it says depends on what it reads."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def dflash(vocabulary: int, **settings: Any) -> PreTrainedModel:
    """A block-diffusion drafter for `tiny_models.tiny` models of two layers; the last id stands for a masked place."""
    config = MuseGlimmerAssistantConfig(
        **{
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "sliding_window": 6,
            "block_size": 5,
            "mask_token_id": vocabulary - 1,
            "target_layer_ids": [0, 1],
            "bos_token_id": 1,
            "eos_token_id": None,
            "pad_token_id": 0,
            **settings,
        }
    )
    return with_weights(MuseGlimmerAssistantModel(config))
