# SPDX-License-Identifier: Apache-2.0
"""Tiny random models that draft beside another one."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from tiny_models import tiny
from transformers import Gemma4AssistantConfig, Gemma4AssistantForCausalLM, Gemma4TextConfig, PreTrainedModel
from transformers.models.muse_glimmer_assistant import MuseGlimmerAssistantConfig, MuseGlimmerAssistantModel

from hf_polyspec.host.release import named_cache, parameters_of


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


class AuthorsForm(torch.nn.Module):
    """A drafter as the method's authors publish it: other names, a plain cache, and hidden states handed back bare."""

    def __init__(self, drafter: PreTrainedModel) -> None:
        super().__init__()
        self.inner = drafter
        own = drafter.config
        self.target_layer_ids = own.target_layer_ids
        self.config = SimpleNamespace(
            hidden_size=own.hidden_size, block_size=own.block_size, dflash_config={"mask_token_id": own.mask_token_id}
        )

    def forward(
        self,
        position_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        noise_embedding: torch.Tensor | None = None,
        target_hidden: torch.Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool = False,
        **kwargs: Any,
    ) -> torch.Tensor:
        assert use_cache
        assert kwargs == {"is_causal": False}
        assert attention_mask is None
        found: torch.Tensor = self.inner(
            noise_embeds=noise_embedding,
            context_hidden_states=target_hidden,
            position_ids=position_ids,
            attention_mask=dict.fromkeys(("full_attention", "sliding_attention")),
            **{named_cache(parameters_of(type(self.inner).forward)) or "": past_key_values},
        ).last_hidden_state
        return found


GEMMA: dict[str, Any] = {
    "head_dim": 8,
    "global_head_dim": 8,
    "sliding_window": 6,
    "hidden_size_per_layer_input": 0,
    "vocab_size_per_layer_input": 0,
    "layer_types": ["sliding_attention", "full_attention"],
    "final_logit_softcapping": None,
    "enable_moe_block": False,
    "use_double_wide_mlp": False,
}


ORDERED = ("use_ordered_embeddings", "num_centroids", "centroid_intermediate_top_k")


def gemma(vocabulary: int, **settings: Any) -> PreTrainedModel:
    """A Gemma 4 target of two layers, of which the first sees a window only."""
    return tiny("gemma4_text", **{**GEMMA, "vocab_size": vocabulary, "num_kv_shared_layers": 0, **settings})


def keyless(vocabulary: int, *, backbone: int = 32, **settings: Any) -> PreTrainedModel:
    """An assistant for `gemma`, which reads keys and values of its layers."""
    text = {
        **GEMMA,
        "vocab_size": vocabulary,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_kv_shared_layers": 2,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": None,
        **settings,
    }
    of_the_assistant = {name: text.pop(name) for name in ORDERED if name in text}
    config = Gemma4AssistantConfig(
        text_config=Gemma4TextConfig(**text), backbone_hidden_size=backbone, **of_the_assistant
    )
    return with_weights(Gemma4AssistantForCausalLM(config))
