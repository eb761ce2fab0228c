# SPDX-License-Identifier: Apache-2.0
"""Tiny random models, made from configuration classes so that nothing is downloaded."""

from __future__ import annotations

import copy
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from hf_polyspec.eagle import EagleHead, init_for

VOCABULARY = 48

COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    # Large weights: the greedy text of a small one is the same token over and over.
    "initializer_range": 0.3,
    # Tied embeddings make a random model repeat its input.
    "tie_word_embeddings": False,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}


def tiny(model_type: str = "llama", *, attention: str = "sdpa", seed: int = 0, **settings: Any) -> PreTrainedModel:
    """A random causal LM of the given `model_type`, in float32, in eval mode, without an end-of-text token.

    Args:
        model_type: as in `config.model_type`.
        attention: "eager" or "sdpa".
        seed: of the weights; the global generator is left as it was.
        settings: configuration values that differ from `COMMON`.
    """
    config = CONFIG_MAPPING[model_type](**{**COMMON, **settings})
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    model = model.float().eval()
    model.generation_config.eos_token_id = settings.get("eos_token_id")
    model.generation_config.pad_token_id = 0
    return model


def noisy(model: PreTrainedModel, scale: float = 0.03, seed: int = 1) -> PreTrainedModel:
    """A copy with noise of `scale` times each parameter's spread: an assistant that is right now and then."""
    generator = torch.Generator().manual_seed(seed)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            if parameter.numel() > 1:
                parameter.add_(scale * parameter.std() * torch.randn(parameter.shape, generator=generator))
    return other


def prompts(batch: int, length: int = 9, vocabulary: int = VOCABULARY, seed: int = 3) -> dict[str, torch.Tensor]:
    """`input_ids` and `attention_mask` `[B, L]`; rows after the first are left-padded, each differently."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, vocabulary, (batch, length), generator=generator)
    mask = torch.ones_like(ids)
    for row in range(1, batch):
        mask[row, : (3 * row) % (length - 1)] = 0
    return {"input_ids": ids * mask, "attention_mask": mask}


def head_for(model: PreTrainedModel, algorithm: str = "eagle3", seed: int = 5, **settings: Any) -> EagleHead:
    """An untrained EAGLE head for a model, the same at every call.

    Args:
        model: the level it is to draft for; algorithm: "eagle3" or "eagle1"; seed: of its weights.
        settings: further arguments of `init_for`.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        head: EagleHead = init_for(model, algorithm, **settings).eval()
    return head


@torch.no_grad()
def in_circles(target: PreTrainedModel) -> PreTrainedModel:
    """The target with the last token alone deciding about the next, so that greedy text soon repeats itself."""
    for name, matrix in target.named_parameters():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            matrix.zero_()
    return target


def accepted_greedily(
    target: PreTrainedModel, levels: list[Any], inputs: dict[str, torch.Tensor], **options: Any
) -> int:
    """Tokens of the lowest level that are accepted in 40 greedy ones, which must be those of plain generation."""
    length = {"max_new_tokens": 40, "do_sample": False}
    output = target.generate(**inputs, **length, assistant_models=levels, return_dict_in_generate=True, **options)
    assert torch.equal(output.sequences, target.generate(**inputs, **length))
    return int(output.polyspec.levels[-1].accepted)
