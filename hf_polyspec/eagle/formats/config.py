# SPDX-License-Identifier: Apache-2.0
"""From a published head's config and the shapes of its tensors to an `EagleHeadConfig`: shapes win."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedConfig

from hf_polyspec.eagle.configuration import DEFAULT_ROPE_THETA, LAST_HIDDEN_STATE
from hf_polyspec.eagle.formats.layers import listed_layers, unsettled_layers
from hf_polyspec.host.modeling import LlamaConfig

Tensors = dict[str, torch.Tensor]

_FIRST = "layers.0.self_attn."

# Switches that change the forward pass in a way the weights do not show: name -> what it asks for.
_REFUSED = {
    "mask_hidden": "parallel drafting (P-EAGLE)",
    "mask_token_id": "parallel drafting (P-EAGLE)",
    "use_mtp_layernorm": "multi-token-prediction norms",
    "quantization_config": "quantised weights",
}
_TOKEN_IDS = ("pad_token_id", "bos_token_id", "eos_token_id")


@dataclass(frozen=True)
class PublishedConfig:
    """A published config, split into what describes the head and what describes its layer.

    Args:
        head: The whole `config.json`.
        layer: The dict that holds the layer's sizes: the same, or speculators' `transformer_layer_config`.
        speculators: Whether the layout is that of speculators.
    """

    head: dict[str, Any]
    layer: dict[str, Any]
    speculators: bool

    @classmethod
    def of(cls, config: dict[str, Any]) -> PublishedConfig:
        """Splits a config, refusing drafters that are not EAGLE heads.

        Raises:
            ValueError: If the config is of another kind of drafter.
        """
        kind = config.get("speculators_model_type")
        if kind is None:
            return cls(config, config, False)
        if kind not in ("eagle", "eagle3"):
            raise ValueError(f"This is a {kind!r} speculator; only EAGLE-1, -2 and -3 heads are supported.")
        layer = config.get("transformer_layer_config")
        if not isinstance(layer, dict):
            raise ValueError("The speculators config has no `transformer_layer_config`.")
        return cls(config, layer, True)

    def switch(self, name: str, default: Any = None) -> Any:
        """Returns a switch from the top level or from `eagle_config`, whichever has it."""
        nested = self.head.get("eagle_config")
        for place in (nested if isinstance(nested, dict) else {}, self.head):
            if place.get(name) is not None:
                return place[name]
        return default

    def size(self, name: str) -> Any:
        """Returns a field of the layer, with the default of its own config class where it was left out."""
        value = self.layer.get(name)
        return value if value is not None else getattr(self._defaults(), name, None)

    def _defaults(self) -> PreTrainedConfig:
        kind = self.layer.get("model_type")
        if kind in (None, "", "llama", "eagle", "eagle3"):
            return LlamaConfig()
        try:
            return AutoConfig.for_model(kind)
        except ValueError:
            return LlamaConfig()


def derive_config(config: dict[str, Any], tensors: Tensors, vocab_size: int | None) -> dict[str, Any]:
    """Derives the fields of an `EagleHeadConfig` from a published config and canonically named tensors.

    Args:
        config: The checkpoint's config.
        tensors: Its tensors under canonical names (`formats.canonical_names`).
        vocab_size: The target's vocabulary as far as the checkpoint's `t2d` tells, or `None`.

    Returns:
        The fields.

    Raises:
        ValueError: If shapes contradict each other, or the config asks for what is not supported (named).
    """
    published = PublishedConfig.of(config)
    _refuse_switches(published)
    fields = _sizes(published, tensors)
    fields.update(_switches(published, tensors, fields["algorithm"]))
    fields.update(_features(published, tensors, fields))
    fields.update(_vocabulary(published, tensors, vocab_size, fields))
    fields["rope_parameters"] = rope_parameters(published.layer)
    fields["sliding_window"] = sliding_window(published.layer, fields["num_hidden_layers"])
    for name in _TOKEN_IDS:
        fields[name] = published.layer.get(name)
    fields["dtype"] = str(tensors[f"{_FIRST}o_proj.weight"].dtype).removeprefix("torch.")
    return fields


def _refuse_switches(published: PublishedConfig) -> None:
    for name, meaning in _REFUSED.items():
        if published.switch(name) or published.layer.get(name):
            raise ValueError(f"The head asks for {meaning} (`{name}`), which is not supported.")
    if (published.switch("parallel_draft_step") or 1) > 1:
        raise ValueError("The head asks for parallel drafting (`parallel_draft_step`), which is unsupported.")
    if published.switch("next_layer_regular") is False:
        raise ValueError("The head's further layers are irregular (`next_layer_regular`): unsupported.")
    architecture = published.head.get("transformer_layer_architecture", "auto")
    if architecture not in ("auto", "LlamaDecoderLayer", "Qwen3DecoderLayer", "Qwen2DecoderLayer"):
        raise ValueError(f"Layers of type {architecture!r} (`transformer_layer_architecture`) are unsupported.")


def _sizes(published: PublishedConfig, tensors: Tensors) -> dict[str, Any]:
    for name in ("q_proj", "k_proj", "o_proj"):
        if f"{_FIRST}{name}.weight" not in tensors:
            raise ValueError(
                f"No EAGLE head: the key {_FIRST}{name}.weight (or its official name) is missing; there are "
                f"{', '.join(sorted(tensors)) or 'no keys at all'}."
            )
    size = tensors[f"{_FIRST}o_proj.weight"].shape[0]
    query_size, width = tensors[f"{_FIRST}q_proj.weight"].shape
    if width not in (size, 2 * size):
        raise ValueError(f"A head {size} wide attends to {size} or {2 * size} values, not {width}.")
    head_dim = _head_dim(published, tensors, query_size)
    gate = tensors.get("layers.0.mlp.gate_proj.weight")
    return {
        "algorithm": "eagle3" if width == 2 * size else "eagle1",
        "hidden_size": size,
        "head_dim": head_dim,
        "num_attention_heads": query_size // head_dim,
        "num_key_value_heads": tensors[f"{_FIRST}k_proj.weight"].shape[0] // head_dim,
        "intermediate_size": gate.shape[0] if gate is not None else published.size("intermediate_size"),
        "num_hidden_layers": 1 + max(_layer_number(name) for name in tensors),
        "rms_norm_eps": published.size("rms_norm_eps") or 1e-6,
        "hidden_act": published.size("hidden_act") or "silu",
        "max_position_embeddings": published.size("max_position_embeddings") or 2048,
        "initializer_range": published.size("initializer_range") or 0.02,
    }


def _layer_number(name: str) -> int:
    parts = name.split(".")
    return int(parts[1]) if parts[0] == "layers" and parts[1].isdigit() else 0


def _head_dim(published: PublishedConfig, tensors: Tensors, query_size: int) -> int:
    """Returns d: from a per-head norm, else the config's, else what splits the projection into its heads."""
    norm = tensors.get(f"{_FIRST}q_norm.weight")
    if norm is not None:
        return norm.shape[0]
    heads = published.size("num_attention_heads")
    listed = published.size("head_dim") if published.layer.get("head_dim") else None
    if listed is None and heads and query_size % heads == 0:
        listed = query_size // heads
    key_size = tensors[f"{_FIRST}k_proj.weight"].shape[0]
    if not listed or query_size % listed or key_size % listed:
        raise ValueError(
            f"Queries {query_size} and keys {key_size} wide do not split into heads as the config says "
            f"(num_attention_heads {heads}, head_dim {published.layer.get('head_dim')})."
        )
    return int(listed)


def _switches(published: PublishedConfig, tensors: Tensors, algorithm: str) -> dict[str, Any]:
    eagle3 = algorithm == "eagle3"
    norm_output = bool(published.switch("norm_output", False)) and "norm.weight" in tensors and eagle3
    if norm_output and not published.speculators:
        warnings.warn(
            "The head's `norm_output: true` is taken to mean that the normed output feeds the next draft "
            "step; if it only says that there is a final norm (SpecForge), pass norm_output=False to "
            "from_pretrained.",
            UserWarning,
            stacklevel=2,
        )
    return {
        "fc_bias": "fc.bias" in tensors,
        "has_fc": "fc.weight" in tensors or not eagle3,
        "attention_bias": f"{_FIRST}q_proj.bias" in tensors,
        "attention_out_bias": f"{_FIRST}o_proj.bias" in tensors,
        "mlp_bias": "layers.0.mlp.gate_proj.bias" in tensors,
        "qk_norm": f"{_FIRST}q_norm.weight" in tensors,
        "embed_norm": not eagle3 and "embed_layernorm.weight" in tensors,
        "fused_norm": not eagle3 and "layers.0.input_layernorm.weight" in tensors,
        "final_norm": "norm.weight" in tensors,
        "norm_output": norm_output,
        "norm_before_fc": eagle3 and "input_norm.weight" in tensors,
        "fc_norm": eagle3 and "fc_norm.0.weight" in tensors,
        # vLLM reads a speculators config that lacks the field as True
        "norm_before_residual": eagle3 and bool(published.switch("norm_before_residual", published.speculators)),
    }


def _features(published: PublishedConfig, tensors: Tensors, fields: dict[str, Any]) -> dict[str, Any]:
    size = fields["hidden_size"]
    if fields["algorithm"] == "eagle1":
        return {"target_hidden_size": size, "num_features": 1, "feature_layer_ids": [LAST_HIDDEN_STATE]}
    last_only = published.switch("use_aux_hidden_state", True) is False
    layers = [LAST_HIDDEN_STATE] if last_only else listed_layers(published.head, published.speculators)
    if not fields["has_fc"]:
        if not last_only:
            raise ValueError("missing keys: fc.weight (the head fuses several features).")
        return {"target_hidden_size": size, "num_features": 1, "feature_layer_ids": layers}
    width = tensors["fc.weight"].shape[1]
    per_feature = tensors.get("fc_norm.0.weight")
    target_size = per_feature.shape[0] if per_feature is not None else published.switch("target_hidden_size")
    count = len(layers) if layers else published.switch("num_aux_hidden_states")
    if not target_size:
        # as many states as are listed, or one less (below), of the head's own width if that adds up
        fits = width % size == 0 and width // size in (count or 3, (count or 3) - 1)
        target_size = size if fits else width // (count or 3)
    count = width // target_size
    if layers is not None and len(layers) == count + 1 and layers[-1] == max(layers):
        layers = _without_teacher(layers)
    if width % target_size or (layers is not None and len(layers) != count):
        raise ValueError(
            f"fc.weight reads features {width} wide, which are not {len(layers or ()) or 3} hidden states of "
            f"{target_size} (layers {layers})."
        )
    unsettled = None if last_only or layers is None else unsettled_layers(published.head, published.speculators)
    return {
        "target_hidden_size": target_size,
        "num_features": count,
        "feature_layer_ids": layers,
        "unsettled_layer_ids": unsettled if unsettled is None else unsettled[:count],
    }


def _without_teacher(layers: list[int]) -> list[int]:
    """The states that a head reads, of a list that ends with the one its trainer learned the target's law from."""
    warnings.warn(
        f"The head's config lists the hidden states {layers}, one more than fc.weight reads; the last one is taken to "
        "be what the head was taught with, and is not read.",
        UserWarning,
        stacklevel=2,
    )
    return layers[:-1]


def _vocabulary(
    published: PublishedConfig, tensors: Tensors, vocab_size: int | None, fields: dict[str, Any]
) -> dict[str, Any]:
    eagle3 = fields["algorithm"] == "eagle3"
    embedding, lm_head = tensors.get("embed_tokens.weight"), tensors.get("lm_head.weight")
    mapping = tensors.get("d2t")
    if vocab_size is None:
        vocab_size = published.size("vocab_size")
    if embedding is not None:
        vocab_size = embedding.shape[0]
    elif lm_head is not None and not eagle3:
        vocab_size = lm_head.shape[0]
    draft_size = vocab_size
    if mapping is not None:
        draft_size = mapping.shape[0]
    elif lm_head is not None:
        draft_size = lm_head.shape[0]
    elif eagle3:
        draft_size = published.head.get("draft_vocab_size") or vocab_size
    # the target's lm_head can stand in for one of the same rows and the same width
    replaceable = draft_size == vocab_size and fields["target_hidden_size"] == fields["hidden_size"]
    return {
        "vocab_size": vocab_size,
        "draft_vocab_size": draft_size,
        "own_embedding": embedding is not None,
        "own_lm_head": lm_head is not None or (eagle3 and not replaceable),
    }


def rope_parameters(layer: dict[str, Any]) -> dict[str, Any]:
    """Returns the rotary settings of a published config; a missing base is 10000, never the target's.

    Raises:
        ValueError: If the settings differ by layer type.
    """
    written = layer.get("rope_parameters") or layer.get("rope_scaling") or {}
    if any(isinstance(value, dict) for value in written.values()):
        raise ValueError("Rotary settings by layer type (`rope_parameters`) are not supported in a head.")
    rope = {key: value for key, value in written.items() if key not in ("type", "mrope_section", "mrope_interleaved")}
    kind = written.get("rope_type", written.get("type", "default"))
    # multimodal rotary positions are the ordinary ones for text
    rope["rope_type"] = "default" if kind in ("mrope", "default", None) else kind
    if rope.get("rope_theta") is None:
        rope["rope_theta"] = layer.get("rope_theta") or DEFAULT_ROPE_THETA
    factor = rope.get("partial_rotary_factor", layer.get("partial_rotary_factor"))
    if factor not in (None, 1.0):
        rope["partial_rotary_factor"] = factor
    return rope


def sliding_window(layer: dict[str, Any], num_layers: int) -> int | None:
    """Returns the attention window of a published config's layers, `None` for all of the context.

    Raises:
        ValueError: If only some of the layers have one.
    """
    window = layer.get("sliding_window")
    if not window or layer.get("use_sliding_window") is False:
        return None
    kinds = layer.get("layer_types")
    if kinds is None:
        # as transformers does: a Llama layer ignores the field, Qwen layers below a number do
        full = num_layers if layer.get("model_type") == "llama" else layer.get("max_window_layers") or 0
        kinds = ["full_attention" if index < full else "sliding_attention" for index in range(num_layers)]
    windowed = {kind == "sliding_attention" for kind in kinds[:num_layers]}
    if len(windowed) > 1:
        raise ValueError("Only some of the head's layers have a `sliding_window`, which is not supported.")
    return int(window) if windowed == {True} else None
