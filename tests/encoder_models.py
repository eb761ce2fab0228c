# SPDX-License-Identifier: Apache-2.0
"""Tiny random targets with an encoder, and inputs for them."""

from __future__ import annotations

from typing import Any

import torch
from tiny_models import VOCABULARY
from transformers import AutoModelForSpeechSeq2Seq
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import AutoModelForSeq2SeqLM

_BART: dict[str, Any] = {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "max_position_embeddings": 64,
    "forced_eos_token_id": None,
}
_HEARS = {**_BART, "max_source_positions": 60, "max_target_positions": 60}
SIZES: dict[str, dict[str, Any]] = {
    "t5": {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4},
    "bart": _BART,
    "marian": _BART,
    "whisper": {**_HEARS, "max_source_positions": 30, "num_mel_bins": 8, "begin_suppress_tokens": None},
    "speech_to_text": {**_HEARS, "input_feat_per_channel": 8, "num_conv_layers": 1, "conv_kernel_sizes": (3,)},
}
FAMILIES = list(SIZES)


def seq_to_seq(family: str, seed: int = 0, **settings: Any) -> Any:
    """A random model with an encoder whose text is not one token over and over."""
    ids = {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 3}
    config = CONFIG_MAPPING[family](vocab_size=VOCABULARY, **ids, **SIZES[family], **settings)
    config.max_length = None
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        auto = AutoModelForSeq2SeqLM if family in ("t5", "bart", "marian") else AutoModelForSpeechSeq2Seq
        model = auto.from_config(config).float().eval()
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.data.normal_(0, 0.3)
    model.generation_config.eos_token_id = None
    model.generation_config.max_length = None
    return model


def inputs(family: str, batch: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    if family == "whisper":
        return {"input_features": torch.randn(batch, 8, 60, generator=generator)}
    if family == "speech_to_text":
        features = torch.randn(batch, 24, 8, generator=generator)
        return {"input_features": features, "attention_mask": torch.ones(batch, 24, dtype=torch.long)}
    ids, mask = torch.randint(4, VOCABULARY, (batch, 7), generator=generator), torch.ones(batch, 7, dtype=torch.long)
    mask[1:, -2:] = 0
    return {"input_ids": ids, "attention_mask": mask}
