# SPDX-License-Identifier: Apache-2.0
"""Architectures that every change is tested with, and some with which drafts cannot be checked."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

WINDOW = 6
"""Sliding windows and chunks, shorter than the texts of the tests."""

MIXED = ["sliding_attention", "full_attention"]
EAGER = ("eager",)
BOTH = ("eager", "sdpa")


@dataclass(frozen=True)
class Architecture:
    """One tested model type.

    Attributes:
        title: as users know it.
        model_type: as in `config.model_type`.
        settings: what its tiny configuration needs besides the common values.
        attention: implementations that transformers has for it and that are tested.
        noise: how far the assistants are from the target; chosen so that some proposals are accepted and some rejected.
        remark: what is special about it.
    """

    title: str
    model_type: str
    settings: dict[str, Any] = field(default_factory=dict)
    attention: tuple[str, ...] = BOTH
    noise: float = 0.04
    remark: str = ""


EXPERTS: dict[str, Any] = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
}
LATENT: dict[str, Any] = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "moe_intermediate_size": 24,
    "first_k_dense_replace": 1,
}
SHARED_KV: dict[str, Any] = {
    "num_hidden_layers": 4,
    "layer_types": MIXED * 2,
    "num_kv_shared_layers": 2,
    "sliding_window": WINDOW,
    "head_dim": 8,
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": 48,
}

ARCHITECTURES = (
    Architecture("Llama", "llama"),
    Architecture("Qwen2", "qwen2"),
    Architecture(
        "Qwen2 with windows",
        "qwen2",
        {"use_sliding_window": True, "sliding_window": WINDOW, "layer_types": MIXED},
        remark="sliding and full layers",
    ),
    Architecture("Qwen2-MoE", "qwen2_moe", {**EXPERTS, "shared_expert_intermediate_size": 24}, remark="experts"),
    Architecture("Qwen3", "qwen3", {"head_dim": 8}),
    Architecture("Qwen3-MoE", "qwen3_moe", {**EXPERTS, "head_dim": 8}, remark="experts"),
    Architecture("Mistral", "mistral", {"sliding_window": WINDOW}, remark="sliding window"),
    Architecture("Mixtral", "mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}, remark="experts"),
    Architecture("Gemma", "gemma", {"head_dim": 8}),
    Architecture(
        "Gemma 2",
        "gemma2",
        {"head_dim": 8, "sliding_window": WINDOW, "layer_types": MIXED, "query_pre_attn_scalar": 8},
        EAGER,
        remark="sliding and full layers, soft-capped scores",
    ),
    Architecture(
        "Gemma 3 (text)",
        "gemma3_text",
        {"head_dim": 8, "sliding_window": WINDOW, "layer_types": MIXED, "query_pre_attn_scalar": 8},
        remark="sliding and full layers",
    ),
    Architecture(
        "Gemma 3n (text)",
        "gemma3n_text",
        {**SHARED_KV, "laurel_rank": 4},
        remark="sliding and full layers, later layers share keys and values",
    ),
    Architecture(
        "Gemma 4 (text)",
        "gemma4_text",
        SHARED_KV,
        remark="sliding and full layers, later layers share keys and values",
    ),
    Architecture("Phi", "phi", {"partial_rotary_factor": 0.5}),
    Architecture("Phi-3", "phi3", {"sliding_window": WINDOW}, remark="sliding window"),
    Architecture("GPT-2", "gpt2", remark="learned positions"),
    Architecture("GPT-BigCode (StarCoder)", "gpt_bigcode", remark="learned positions, one key-value head"),
    Architecture(
        "GPT-Neo",
        "gpt_neo",
        {"attention_types": [[["global", "local"], 1]], "window_size": WINDOW},
        EAGER,
        remark="learned positions, local layers",
    ),
    Architecture("GPT-NeoX (Pythia)", "gpt_neox"),
    Architecture("GPT-J", "gptj", {"rotary_dim": 4}, EAGER),
    Architecture("CodeGen", "codegen", {"rotary_dim": 4}, EAGER),
    Architecture(
        "GPT-OSS",
        "gpt_oss",
        {
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "head_dim": 8,
            "sliding_window": WINDOW,
            "layer_types": MIXED,
        },
        EAGER,
        remark="experts, sliding and full layers, attention sinks",
    ),
    Architecture("OPT", "opt", {"ffn_dim": 48, "word_embed_proj_dim": 32}, remark="learned positions"),
    Architecture("BLOOM", "bloom", attention=EAGER, remark="ALiBi"),
    Architecture("Falcon", "falcon", remark="one key-value head"),
    Architecture("Falcon with ALiBi", "falcon", {"alibi": True, "new_decoder_architecture": False}, remark="ALiBi"),
    Architecture("MPT", "mpt", {"expansion_ratio": 2, "max_seq_len": 128}, EAGER, remark="ALiBi"),
    Architecture("OLMo", "olmo"),
    Architecture("OLMo 2", "olmo2"),
    Architecture("OLMo 3", "olmo3", {"sliding_window": WINDOW, "layer_types": MIXED}, remark="sliding and full layers"),
    Architecture("OLMoE", "olmoe", {"num_experts": 4, "num_experts_per_tok": 2}, remark="experts"),
    Architecture("Granite", "granite"),
    Architecture("Granite-MoE", "granitemoe", {"num_local_experts": 4, "num_experts_per_tok": 2}, remark="experts"),
    Architecture("StableLM", "stablelm"),
    Architecture("StarCoder 2", "starcoder2", {"sliding_window": WINDOW}, remark="sliding window"),
    Architecture("Cohere", "cohere"),
    Architecture(
        "Cohere 2",
        "cohere2",
        {"sliding_window": WINDOW, "layer_types": MIXED, "head_dim": 8},
        remark="sliding and full layers",
    ),
    Architecture("DeepSeek-V2", "deepseek_v2", {**LATENT, "topk_method": "greedy"}, remark="latent attention, experts"),
    Architecture("DeepSeek-V3", "deepseek_v3", LATENT, remark="latent attention, experts"),
    Architecture("GLM", "glm", {"head_dim": 8}),
    Architecture("GLM-4", "glm4", {"head_dim": 8}),
    Architecture("SmolLM3", "smollm3", remark="layers without positions"),
    Architecture(
        "EXAONE 4", "exaone4", {"sliding_window": WINDOW, "layer_types": MIXED}, remark="sliding and full layers"
    ),
    Architecture("ERNIE 4.5", "ernie4_5"),
    Architecture(
        "Llama 4 (text)",
        "llama4_text",
        {
            "head_dim": 8,
            "num_local_experts": 4,
            "num_experts_per_tok": 1,
            "intermediate_size_mlp": 48,
            "attention_chunk_size": WINDOW,
            "no_rope_layers": [1, 0],
            "layer_types": ["chunked_attention", "full_attention"],
        },
        remark="chunked and full layers, experts",
    ),
    Architecture("Nemotron", "nemotron"),
    Architecture("Persimmon", "persimmon"),
    Architecture("XGLM", "xglm", {"ffn_dim": 48}, EAGER, remark="sinusoidal positions"),
    Architecture("BioGPT", "biogpt", remark="learned positions"),
    Architecture("RoBERTa as decoder", "roberta", {"is_decoder": True}, remark="learned positions"),
)


@dataclass(frozen=True)
class Unchecked:
    """One model type with which drafts cannot be checked.

    Attributes:
        title: as users know it.
        model_type: as in `config.model_type`.
        words: part of the message.
        why: for the page.
        settings: what its tiny configuration needs.
    """

    title: str
    model_type: str
    words: str
    why: str
    settings: dict[str, Any] = field(default_factory=dict)


UNCHECKED = (
    Unchecked("BERT (without `is_decoder=True`)", "bert", "is_decoder", "attends to both sides"),
    Unchecked(
        "CPM-Ant",
        "cpmant",
        "prompt positions of its own",
        "its cache holds more than the tokens it was given",
        {"dim_head": 8, "dim_ff": 48},
    ),
)
