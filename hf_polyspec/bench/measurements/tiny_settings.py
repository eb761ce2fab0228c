# SPDX-License-Identifier: Apache-2.0
"""What single classes of transformers need besides small numbers, to be built tiny: one table, by type."""

from __future__ import annotations

from typing import Any

Settings = dict[str, Any]

_WIDE: Settings = {"mamba_d_head": 16, "mamba_head_dim": 16, "mamba_n_heads": 4, "mamba_chunk_size": 8}
_SECTIONS: Settings = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
"""Rotary embeddings of three dimensions, for heads of eight numbers."""
_PLANES: Settings = {"text_config": {"rope_parameters": _SECTIONS}}
_PLAIN_GEMMA: Settings = {"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0}
_TOKENS = {"<image>": 40, "<|extra_200|>": 41, "<|visual token 000000|>": 42, "IMGIMGBS00Z": 43}
_INDEXER: Settings = {"ngram_vocab_size_base": 64, "rope_parameters": _SECTIONS}
_PIECES: Settings = {
    "layer_types": ["indexed_attention", "sliding_attention"],
    "use_dsa": True,
    "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 4,
    "swa_q_lora_rank": 16,
    "swa_kv_lora_rank": 16,
    "swa_head_dim": 12,
    "swa_qk_nope_head_dim": 8,
    "swa_v_head_dim": 8,
}
_SUPERPOSED: Settings = {
    "layers_block_type": ["linear_attention", "full_attention"],
    "mamba_head_dim": 16,
    "mamba_num_heads": 4,
}
_ONE_BOOK: Settings = {"decoder": {"num_codebooks": 1}}
_MIXED = ["linear_attention", "full_attention"]
_PICTURES: Settings = {"base_channels": 32, "channel_multiplier": [1], "num_res_blocks": 1, "attn_resolutions": [0]}
"""An encoder of pictures into words, for which a smallest network is wide."""
_DENSE: Settings = {"mlp_layer_types": ["dense"], "adapter_in_dim": 16, "adapter_out_dim": 32}

OWN: dict[str, Settings] = {
    "bamba": {**_WIDE, "attn_layer_indices": [1]},
    "falcon_h1": {**_WIDE, "mamba_d_ssm": 64},
    "granitemoehybrid": {**_WIDE, "layer_types": _MIXED, "shared_intermediate_size": 16},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "use_mamba_kernels": False},
    "mamba2": {"num_heads": 4, "head_dim": 16, "chunk_size": 8},
    "recurrent_gemma": {"block_types": ["recurrent", "attention"]},
    "zamba": {
        "layers_block_type": ["linear_attention", "hybrid"],
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
        "use_mamba_kernels": False,
    },
    "zamba2": {"layers_block_type": ["linear_attention", "hybrid"], "n_mamba_heads": 4, "chunk_size": 8},
    "nemotron_h": _SUPERPOSED,
    "gemma4_assistant": {"text_config": _PLAIN_GEMMA},
    "gemma4_unified_assistant": {"text_config": _PLAIN_GEMMA},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 16},
    "gemma3n_text": {"num_kv_shared_layers": 0, "layer_types": ["sliding_attention", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "longcat_flash": {"head_dim": 4, "num_layers": 1, "zero_expert_num": 2},
    "reformer": {"axial_pos_embds_dim": (16, 16), "axial_pos_shape": (8, 16)},
    "zaya": {"num_experts_per_tok": 1},
    "blt": {"patch_in_forward": False},
    "cohere_compass_text": {"rope_parameters": {"full_attention": _SECTIONS}},
    "cohere_compass": {"text_config": {"rope_parameters": {"full_attention": _SECTIONS}}},
    "dbrx": {"attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0}},
    "dory": {"num_hidden_layers": 3, "n_input_layers": 1, "n_output_layers": 1, "layer_types": None},
    "dots3_note_text": _PIECES,
    "dots3_note": {
        "text_config": _PIECES,
        "vision_config": _DENSE,
        "audio_config": {"adapter_input_size": 16, "adapter_out_dim": 32, "downsample_hidden_size": 8},
    },
    "inkling2_text": {"unpadded_vocab_size": 48},
    "inkling2_loop_text": {"unpadded_vocab_size": 48},
    "inkling2": {"text_config": {"unpadded_vocab_size": 48}, "vision_config": {"text_hidden_size": 32}},
    "inkling2_loop": {"text_config": {"unpadded_vocab_size": 48}, "vision_config": {"text_hidden_size": 32}},
    "qwen4_exp_text": _INDEXER,
    "qwen4_exp": {"text_config": _INDEXER},
    "xlstm": {"hidden_size": 128, "num_heads": 2, "qk_dim_factor": 0.5},
    "moshi": {"sliding_window": 64},
    "xmod": {"default_language": "en_XX"},
    **dict.fromkeys(("qwen2_vl", "qwen2_5_vl", "glm4v", "glm46v", "glm_ocr", "paddleocr_vl", "hunyuan_vl"), _PLANES),
    "cosmos3_edge": _PLANES,
    "hy_v4_vl": {"text_config": {"rope_parameters": _SECTIONS, "qk_rope_head_dim": 8}},
    "molmo2": {"adapter_config": {"vision_feature_layer": [-1, -1]}},
    "glm4v_moe": {"text_config": {"rope_parameters": _SECTIONS, "head_dim": 16}},
    "glm5_next": {"text_config": {"qk_rope_head_dim": 0}},
    "emu3": {"vocabulary_map": _TOKENS, "vq_config": {**_PICTURES, "hidden_size": 8, "codebook_size": 16}},
    "chameleon": {"vocabulary_map": _TOKENS},
    "qwen2_5_omni_thinker": {"vision_start_token_id": 44, **_PLANES},
    "qwen3_omni_moe_thinker": {
        "vision_start_token_id": 44,
        "text_config": {"rope_parameters": _SECTIONS, "sliding_window": None},
    },
    "granite4_vision": {
        "deepstack_layer_map": [[-1, 0]],
        "spatial_target_layers": [0],
        "downsample_rate": "1/2",
        "vision_config": {"hidden_size": 64},  # one head for every 64
    },
    "nemotron_h_omni": {
        "vision_config": {"video_temporal_patch_size": 2},
        "text_config": _SUPERPOSED,
        "audio_config": None,  # its encoder's default has not the width that the model asks for
        "vision_hidden_size": 16,
        "projector_hidden_size": 16,
    },
    "apertus1p5": {
        "vision_config": {**_PICTURES, "codebook_size": 4},
        "audio_config": {"hidden_size": 32, "codebook_dim": 32, "decoder_hidden_size": 32, "codebook_size": 4},
        "image_token_offset": 40,
        "audio_token_offset": 44,
    },
    "ernie4_5_vl_moe": {"text_config": {"rope_parameters": {**_SECTIONS, "mrope_section": [1, 1, 2]}}},
    "unlimited_ocr": {"text_config": {"num_key_value_heads": 4}},
    "deepseek_ocr2": {"text_config": {"mlp_layer_types": ["dense", "sparse"]}},
    **dict.fromkeys(("musicgen", "musicgen_melody"), _ONE_BOOK),
    "gemma3n": {"text_config": {"num_kv_shared_layers": 0, "layer_types": ["sliding_attention", "full_attention"]}},
    "muse_spark": {
        "vision_config": {"num_hidden_layers": 4, "layer_types": ["full_attention"] * 4},
        "audio_config": {"num_hidden_layers": 4, "hidden_sizes": [8, 8, 8, 16]},
    },
}
