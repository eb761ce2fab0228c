# SPDX-License-Identifier: Apache-2.0
"""Writing a head in the official or the speculators layout, so that it serves elsewhere."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from hf_polyspec.eagle.configuration import DEFAULT_ROPE_THETA, LAST_HIDDEN_STATE, EagleHeadConfig
from hf_polyspec.eagle.modeling import EagleHead
from hf_polyspec.eagle.vocabulary import readable_rows

Tensors = dict[str, torch.Tensor]

_EAGLE1_OFFICIAL = (
    ("norm.", "lm_head_layernorm."),
    ("layers.0.input_layernorm.", "hidden_layernorm."),
)
_EAGLE1_SPECULATORS = (
    ("norm.", "pre_lm_head_layernorm."),
    ("embed_layernorm.", "embedding_layernorm."),
    ("layers.0.", "transformer."),
    ("fc.", "fusion_fc."),
)


def export_official(
    head: EagleHead,
    folder: str | os.PathLike[str],
    *,
    architectures: Sequence[str] | None = None,
    embedding: bool | None = None,
    overwrite: bool = False,
) -> Path:
    """Writes a head in the layout of the EAGLE authors, as vLLM and SGLang read it.

    Args:
        head: The head; bound to its target if the layout needs what the head borrows.
        folder: Where to write `config.json` and `model.safetensors`.
        architectures: For the config; default `LlamaForCausalLM` (EAGLE-1; SGLang wants
            `LlamaForCausalLMEagle`) or `LlamaForCausalLMEagle3`, which both know.
        embedding: Whether to store the embedding; default: for EAGLE-1 if it is at hand (the official files
            have it), for EAGLE-3 only if it is the head's own.
        overwrite: Replace a checkpoint that is already there.

    Returns:
        The folder.

    Raises:
        ValueError: If the layout cannot hold this head.
        FileExistsError: If there is a checkpoint already.
    """
    config = head.config
    if config.qk_norm:
        raise ValueError("The official layout has no per-head norms (`qk_norm`); use the speculators layout.")
    default = "LlamaForCausalLM" if config.algorithm == "eagle1" else "LlamaForCausalLMEagle3"
    if embedding is None:
        embedding = config.own_embedding or (config.algorithm == "eagle1" and head.is_bound)
    tensors = _portable_tensors(head, embedding)
    if config.algorithm == "eagle1":
        tensors = _renamed(tensors, _EAGLE1_OFFICIAL)
    elif config.num_hidden_layers == 1:
        tensors = _renamed(tensors, (("layers.0.", "midlayer."),))
    written = {
        "architectures": list(architectures or [default]),
        **_layer_config(head),
        **_head_switches(config),
    }
    if config.algorithm == "eagle1":
        written |= {"bias": config.fc_bias, "qkv_bias": config.attention_bias}
    else:
        written |= _official_features(config)
    return _write(Path(folder), written, tensors, overwrite)


def export_speculators(
    head: EagleHead,
    folder: str | os.PathLike[str],
    *,
    verifier: str | None = None,
    verifier_architectures: Sequence[str] = (),
    speculative_tokens: int = 3,
    embedding: bool | None = None,
    overwrite: bool = False,
) -> Path:
    """Writes a head in the layout of the speculators library, which `vllm serve` takes directly.

    Args:
        head: The head; bound to its target if the layout needs what the head borrows.
        folder: Where to write `config.json` and `model.safetensors`.
        verifier: Hub id or path of the target.
        verifier_architectures: The target's architectures.
        speculative_tokens: Tokens a server should draft per round.
        embedding: Whether to store the embedding; default: only if it is the head's own.
        overwrite: Replace a checkpoint that is already there.

    Returns:
        The folder.

    Raises:
        ValueError: If the layout cannot hold this head.
        FileExistsError: If there is a checkpoint already.
    """
    config = head.config
    tensors = _portable_tensors(head, config.own_embedding if embedding is None else embedding)
    eagle1 = config.algorithm == "eagle1"
    written: dict[str, Any] = {
        "architectures": ["EagleSpeculator" if eagle1 else "Eagle3DraftModel"],
        "speculators_model_type": "eagle" if eagle1 else "eagle3",
        "speculators_version": "0.1.0" if eagle1 else "0.3.0",
        "speculators_config": {
            "algorithm": "eagle" if eagle1 else "eagle3",
            "default_proposal_method": "greedy",
            "proposal_methods": [{"proposal_type": "greedy", "speculative_tokens": speculative_tokens}],
            "verifier": {"name_or_path": verifier, "architectures": list(verifier_architectures)},
        },
        "transformer_layer_config": _layer_config(head),
        "torch_dtype": str(head.dtype).removeprefix("torch."),
    }
    if eagle1:
        written |= _speculators_eagle1(config)
        tensors = _renamed(tensors, _EAGLE1_SPECULATORS)
    else:
        written |= {"draft_vocab_size": config.draft_vocab_size, **_head_switches(config)}
        written |= {"eagle_aux_hidden_state_layer_ids": _speculators_layers(config)}
    return _write(Path(folder), written, tensors, overwrite)


# -- tensors -------------------------------------------------------------------------------------------------


def _portable_tensors(head: EagleHead, embedding: bool) -> Tensors:
    """Returns the head's own tensors, and the borrowed ones that a checkpoint of its algorithm must have."""
    tensors = {name: tensor.detach().cpu() for name, tensor in head.state_dict().items()}
    if not embedding:
        tensors.pop("embed_tokens.weight", None)
    elif "embed_tokens.weight" not in tensors:
        tensors["embed_tokens.weight"] = _embedding_rows(head)
    if head.config.algorithm == "eagle3" and not head.config.own_lm_head:
        tensors["lm_head.weight"] = _lm_head_rows(head)
    if head.config.algorithm == "eagle1" and not head.config.own_lm_head:
        # there the target's lm_head scores every id; which ones a drafter looks at is not written
        tensors.pop("d2t", None)
    elif "d2t" in tensors:
        member = torch.zeros(head.config.vocab_size, dtype=torch.bool)
        member[head.target_ids().cpu()] = True
        tensors["t2d"] = member
    return tensors


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


def _renamed(tensors: Tensors, pairs: Sequence[tuple[str, str]]) -> Tensors:
    out: Tensors = {}
    for name, tensor in tensors.items():
        for old, new in pairs:
            if name.startswith(old):
                name = new + name[len(old) :]
                break
        out[name] = tensor
    return out


# -- configs -------------------------------------------------------------------------------------------------


def _layer_config(head: EagleHead) -> dict[str, Any]:
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


def _head_switches(config: EagleHeadConfig) -> dict[str, Any]:
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


def _official_features(config: EagleHeadConfig) -> dict[str, Any]:
    """Returns the vocabulary and layer fields; layers in both conventions, each where it is looked for."""
    fields: dict[str, Any] = {"draft_vocab_size": config.draft_vocab_size}
    layers = config.feature_layer_ids
    if layers == [LAST_HIDDEN_STATE] or not config.has_fc:
        return fields | {"eagle_config": {"use_aux_hidden_state": False}}
    if config.num_features != 3:
        fields["num_aux_hidden_states"] = config.num_features
    if layers is None:
        return fields
    fields["eagle_aux_hidden_state_layer_ids"] = layers
    if min(layers) > 0:  # the embedding's output is no layer's output
        outputs = [index - 1 for index in layers]
        fields["eagle_config"] = {"use_aux_hidden_state": True, "eagle_aux_hidden_state_layer_ids": outputs}
    return fields


def _speculators_layers(config: EagleHeadConfig) -> list[int] | None:
    layers = config.feature_layer_ids
    if layers == [LAST_HIDDEN_STATE] or not config.has_fc:
        raise ValueError("The speculators layout has no heads that read only the last hidden state.")
    return layers


def _speculators_eagle1(config: EagleHeadConfig) -> dict[str, Any]:
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


# -- files ---------------------------------------------------------------------------------------------------


def _write(folder: Path, config: dict[str, Any], tensors: Tensors, overwrite: bool) -> Path:
    names = ("config.json", "model.safetensors")
    taken = [name for name in names if (folder / name).exists()]
    if taken and not overwrite:
        raise FileExistsError(f"{folder} already holds {' and '.join(taken)}; pass overwrite=True to replace them.")
    folder.mkdir(parents=True, exist_ok=True)
    weights, written = folder / ".model.safetensors.partial", folder / ".config.json.partial"
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, weights, metadata={"format": "pt"})
    written.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    os.replace(weights, folder / names[1])
    os.replace(written, folder / names[0])
    return folder
