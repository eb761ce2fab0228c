# SPDX-License-Identifier: Apache-2.0
"""What an exported head's files hold: tensors without what servers share with the target, and fields of configs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from hf_polyspec.eagle.configuration import DEFAULT_ROPE_THETA, LAST_HIDDEN_STATE, EagleHeadConfig
from hf_polyspec.eagle.modeling import EagleHead
from hf_polyspec.eagle.vocabulary import readable_rows

Tensors = dict[str, torch.Tensor]

# -- tensors -------------------------------------------------------------------------------------------------


def portable_tensors(head: EagleHead, embedding: bool, lm_head: bool) -> Tensors:
    """The tensors of a head's file, by this library's names.

    Args:
        head: The head, bound to its target where rows of the target are wanted.
        embedding: Whether the embedding is among them, the target's if the head has none of its own.
        lm_head: Likewise the lm_head.

    Raises:
        ValueError: If the target's rows are wanted and it is not bound, or they cannot stand in a file.
    """
    wanted = {
        "embedding": embedding and not head.config.own_embedding and head.borrowed.embed_tokens is None,
        "lm_head's rows": lm_head and not head.config.own_lm_head and head.borrowed.lm_head is None,
    }
    lacking = [name for name, missing in wanted.items() if missing]
    if lacking:
        raise ValueError(
            f"The file must hold its target's {' and '.join(lacking)}: bind the head to the model that it drafts for, "
            "or give that model as target."
        )
    tensors = {name: tensor.detach().cpu() for name, tensor in head.state_dict().items()}
    if not embedding:
        tensors.pop("embed_tokens.weight", None)
    elif "embed_tokens.weight" not in tensors:
        tensors["embed_tokens.weight"] = _embedding_rows(head)
    if lm_head and not head.config.own_lm_head:
        tensors["lm_head.weight"] = _lm_head_rows(head)
    if head.config.algorithm == "eagle1" and not head.config.own_lm_head:
        # there the target's lm_head scores every id; which ones a drafter looks at is not written
        tensors.pop("d2t", None)
    elif "d2t" in tensors:
        member = torch.zeros(head.config.vocab_size, dtype=torch.bool)
        member[head.target_ids().cpu()] = True
        tensors["t2d"] = member
    return tensors


def stores_lm_head(config: EagleHeadConfig) -> bool:
    """Whether a head's file must hold an lm_head: its own, or the target's rows of the few ids it scores.

    Servers share the target's lm_head with an EAGLE-3 head that scores all ids, and with every EAGLE-1 head.
    """
    return bool(config.own_lm_head) or (config.algorithm == "eagle3" and config.maps_vocabulary)


@torch.no_grad()
def _embedding_rows(head: EagleHead) -> torch.Tensor:
    """Returns what the borrowed embedding yields for every id, `[V, H]`: its rows, scaled if it scales."""
    module = head.get_input_embeddings()
    if type(module) is nn.Embedding and module.weight.device.type != "meta":
        return module.weight.detach()[: head.config.vocab_size].to("cpu", head.dtype)
    ids = torch.arange(head.config.vocab_size)
    return torch.cat([head.embed(ids[None, start : start + 4096])[0].cpu() for start in range(0, len(ids), 4096)])


def _lm_head_rows(head: EagleHead) -> torch.Tensor:
    """Returns the borrowed lm_head's rows `[Vd, H]` as an lm_head of the head's own.

    Raises:
        ValueError: If no such lm_head scores alike.
    """
    borrowed = head.borrowed
    if borrowed.logit_softcap is not None:
        raise ValueError("The target caps its logits, which an EAGLE-3 checkpoint cannot; train with own_lm_head.")
    weight, bias = readable_rows(borrowed.need_lm_head(), head.target_ids())
    if bias is not None:
        raise ValueError("The lm_head has a bias, which an EAGLE-3 checkpoint has not; train with own_lm_head.")
    scaled = weight if borrowed.logit_scale == 1.0 else weight * borrowed.logit_scale
    return scaled.to("cpu", head.dtype)


def renamed(tensors: Tensors, pairs: Sequence[tuple[str, str]]) -> Tensors:
    """Tensors with the first of the given beginnings of their names replaced, `(old, new)` each."""
    out: Tensors = {}
    for name, tensor in tensors.items():
        for old, new in pairs:
            if name.startswith(old):
                name = new + name[len(old) :]
                break
        out[name] = tensor
    return out


# -- configs -------------------------------------------------------------------------------------------------


def layer_config(head: EagleHead) -> dict[str, Any]:
    """The fields of a Llama (or Qwen3) config that describe a head's layer."""
    config = head.config
    rope = dict(config.rope_parameters or {})
    theta = rope.get("rope_theta", DEFAULT_ROPE_THETA)
    scaled = rope.get("rope_type", "default") != "default"
    layer = {
        "model_type": "qwen3" if config.qk_norm else "llama",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "hidden_act": config.hidden_act,
        "rms_norm_eps": config.rms_norm_eps,
        "max_position_embeddings": config.max_position_embeddings,
        "initializer_range": config.initializer_range,
        "attention_bias": config.attention_bias,
        "mlp_bias": config.mlp_bias,
        "rope_theta": theta,
        # the two spellings of transformers 4 and 5
        "rope_scaling": {key: value for key, value in rope.items() if key != "rope_theta"} if scaled else None,
        "rope_parameters": {"rope_type": "default"} | rope | {"rope_theta": theta},
        "pad_token_id": config.pad_token_id,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": config.eos_token_id,
        "tie_word_embeddings": False,
        "use_cache": True,
        "sliding_window": config.sliding_window,
        "torch_dtype": str(head.dtype).removeprefix("torch."),
    }
    if config.sliding_window is not None:
        layer["layer_types"] = ["sliding_attention"] * config.num_hidden_layers
    return {name: value for name, value in layer.items() if value is not None or name == "rope_scaling"}


def head_switches(config: EagleHeadConfig) -> dict[str, Any]:
    """The switches of an EAGLE-3 head that its weights do not show."""
    if config.algorithm == "eagle1":
        if config.norm_output:
            raise ValueError("No EAGLE-1 layout can say that the normed output is fed back (`norm_output`).")
        return {}
    switches: dict[str, Any] = {
        "norm_before_residual": config.norm_before_residual,
        "norm_before_fc": config.norm_before_fc,
        "fc_norm": config.fc_norm,
        "target_hidden_size": config.target_hidden_size,
    }
    if config.norm_output:
        switches["norm_output"] = True
    return switches


def official_features(config: EagleHeadConfig, lm_head: bool, sglang: bool = False) -> dict[str, Any]:
    """The vocabulary and layer fields; layers in both conventions, each where it is looked for.

    SGLang takes the target's lm_head where `draft_vocab_size` is there and null; vLLM reads null as all ids.
    """
    fields: dict[str, Any] = {"draft_vocab_size": config.draft_vocab_size if lm_head else None}
    layers = config.feature_layer_ids
    if reads_last_state_only(config):
        return fields | {"eagle_config": {"use_aux_hidden_state": False}}
    if config.num_features != 3:
        fields["num_aux_hidden_states"] = config.num_features
    if layers is None:
        return fields
    fields["eagle_aux_hidden_state_layer_ids"] = layers
    if sglang and layers[0] == 1:
        raise ValueError(f"SGLang cannot be told to read the hidden states {layers}: it takes a first 1 for a 2.")
    if sglang and layers[0] != 2:
        # it adds one to the numbers of a list that begins with 1, and reads any other list as states
        fields["eagle_config"] = {"use_aux_hidden_state": True, "eagle_aux_hidden_state_layer_ids": layers}
    elif min(layers) > 0:  # the embedding's output is no layer's output
        outputs = [index - 1 for index in layers]
        fields["eagle_config"] = {"use_aux_hidden_state": True, "eagle_aux_hidden_state_layer_ids": outputs}
    return fields


def reads_last_state_only(config: EagleHeadConfig) -> bool:
    """Whether a head reads nothing but the state that the target's lm_head reads."""
    return config.feature_layer_ids == [LAST_HIDDEN_STATE] or not config.has_fc


def speculators_eagle3(config: EagleHeadConfig) -> dict[str, Any]:
    """The fields of an EAGLE-3 head in the speculators layout, whose layer numbers are indices into `hidden_states`."""
    if reads_last_state_only(config):
        raise ValueError("The speculators layout has no heads that read only the last hidden state.")
    return {
        "draft_vocab_size": config.draft_vocab_size,
        "eagle_aux_hidden_state_layer_ids": config.feature_layer_ids,
        **head_switches(config),
    }


def speculators_eagle1(config: EagleHeadConfig) -> dict[str, Any]:
    """The fields of an EAGLE-1 head in the speculators layout."""
    norms = (config.embed_norm, config.fused_norm, bool(config.final_norm))
    if any(norms) and not all(norms):
        raise ValueError("The speculators EAGLE-1 layout has either all of its three extra norms or none.")
    if config.num_hidden_layers != 1 or config.own_lm_head or config.norm_output:
        raise ValueError("The speculators EAGLE-1 layout holds one layer, no lm_head and no `norm_output`.")
    return {
        "transformer_layer_architecture": "Qwen3DecoderLayer" if config.qk_norm else "LlamaDecoderLayer",
        "layernorms": all(norms),
        "fusion_bias": config.fc_bias,
    }
