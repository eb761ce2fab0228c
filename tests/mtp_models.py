# SPDX-License-Identifier: Apache-2.0
"""Tiny models that bring multi-token-prediction layers along."""

from __future__ import annotations

from typing import Any

import torch
from tiny_models import tiny
from transformers import PreTrainedModel, modeling_layers

SIZES: dict[str, dict[str, Any]] = {
    "glm4_moe": {"head_dim": 8},
    "deepseek_v3": {
        "q_lora_rank": 8,
        "kv_lora_rank": 8,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 8,
        "num_key_value_heads": 4,
    },
}
_EXPERTS: dict[str, Any] = {
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "moe_intermediate_size": 16,
    "first_k_dense_replace": 1,
}


def with_mtp(family: str, layers: int, **settings: Any) -> tuple[PreTrainedModel, Any]:
    """A random model and transformers' model of its multi-token-prediction layers, random too."""
    model = tiny(family, **{**_EXPERTS, **SIZES[family], "num_mtp_layers": layers, **settings})
    with torch.random.fork_rng():
        torch.manual_seed(1)
        made = modeling_layers.MtpModel(model, layers).eval()
        for parameter in made.layers.parameters():
            if parameter.dim() > 1:
                parameter.data.normal_(0, 0.3)
    return model, made
