# SPDX-License-Identifier: Apache-2.0
"""Any class of transformers built tiny: its own configuration, with small numbers under names that are known."""

from __future__ import annotations

import copy
import inspect
from typing import Any, get_args, get_origin

import torch

from ...host.modeling import CONFIG_MAPPING, model_class
from .tiny_settings import OWN

VOCABULARY = 48
IMAGE = 40
"""Ids below this one are text; those that stand for images and the like are not below it."""

_SMALL: dict[str, Any] = {
    **dict.fromkeys(("vocab_size", "text_vocab_size", "vocab_size_per_layer_input"), VOCABULARY),
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "embed_dim", "dim", "embedding_size", "model_dim"), 32),
    **dict.fromkeys(("word_embed_proj_dim", "attention_hidden_size", "lru_width", "decoder_hidden_size"), 32),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "decoder_ffn_dim", "encoder_ffn_dim", "ffn_hidden_size"), 48),
    **dict.fromkeys(("n_inner", "dim_ff", "d_ff", "ffn_size", "mlp_dim", "intermediate_size_mlp"), 48),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "encoder_layers"), 2),
    **dict.fromkeys(("num_decoder_layers", "num_encoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("encoder_attention_heads", "num_decoder_attention_heads", "num_encoder_attention_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads", "multi_query_group_num"), 2),
    **dict.fromkeys(("head_dim", "dim_head", "v_head_dim", "qk_nope_head_dim", "global_head_dim", "kv_channels"), 8),
    **dict.fromkeys(("qk_rope_head_dim", "rotary_dim"), 4),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank"), 16),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx", "seq_length"), 128),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "num_moe_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "top_k_experts"), 2),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "expert_ffn_hidden_size"), 16),
    **dict.fromkeys(("n_group", "topk_group", "n_shared_experts", "first_k_dense_replace"), 1),
    **dict.fromkeys(("initializer_range", "init_std"), 0.3),
    **dict.fromkeys(("linear_num_key_heads", "linear_num_value_heads", "mamba_n_heads", "mamba_num_heads"), 4),
    "linear_num_heads": 4,
    "linear_head_dim": 8,
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim", "mamba_head_dim", "mamba_d_head"), 8),
    **dict.fromkeys(("state_size", "mamba_d_state", "ssm_state_size", "hidden_size_per_layer_input"), 8),
    **dict.fromkeys(("sliding_window", "window_size", "attention_chunk_size"), 16),
    **dict.fromkeys(("index_topk", "indexer_budget", "index_head_dim", "indexer_head_dim"), 8),
    **dict.fromkeys(("index_n_heads", "indexer_n_heads"), 16),
    **dict.fromkeys(("indexer_kv_heads", "n_groups"), 1),
    **dict.fromkeys(("index_kpool", "indexer_compress_ratio"), 2),
    "query_pre_attn_scalar": 8,
    "expansion_ratio": 2,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
_SIGHT: dict[str, Any] = {
    **{name: 16 for name, value in _SMALL.items() if value == 32},
    **{name: 32 for name, value in _SMALL.items() if value == 48 and not name.endswith("vocab_size")},
    **dict.fromkeys(("num_hidden_layers", "num_layers", "depth", "encoder_layers", "n_layers"), 1),
    **dict.fromkeys(("num_attention_heads", "num_heads", "encoder_attention_heads", "num_key_value_heads"), 2),
    **dict.fromkeys(("image_size", "input_size"), 8),
    **dict.fromkeys(("patch_size", "spatial_patch_size"), 4),
    "out_hidden_size": 32,
    "projection_dim": 32,
    "fullatt_block_indexes": [0],
    "deepstack_visual_indexes": [0],
    "vision_use_head": False,
}
_SPECIAL = ("image", "video", "audio", "boi", "eoi", "boa", "eoa", "vision", "speech")


def settings(kind: type[Any], *, sight: bool = False) -> dict[str, Any]:
    """Arguments that make a configuration of a class small; sub-configurations as dictionaries.

    Args:
        kind: the class; sight: whether it is of an encoder of pictures or sounds.
    """
    table = {**_SMALL, **_SIGHT} if sight else _SMALL
    fields = inspect.signature(kind.__init__).parameters
    aliases = {own: common for common, own in (getattr(kind, "attribute_map", None) or {}).items()}
    made: dict[str, Any] = {}
    special = IMAGE
    for name, field in fields.items():
        common = aliases.get(name, name)
        if name in table or common in table:
            made[name] = _like(field, table[name if name in table else common])
        elif name.endswith(("_token_id", "_token_index")) and name.startswith(_SPECIAL) and field.default is not None:
            made[name], special = special, special + 1
    if "qk_rope_head_dim" in fields:  # latent attention: a key for every query
        made.pop("head_dim", None)  # derived there
        made.update({name: made["num_attention_heads"] for name in fields if name == "num_key_value_heads"})
    if "is_decoder" in fields:
        made["is_decoder"] = True
    if "layer_types" in fields:
        kinds = _layer_kinds(kind)
        if kinds:
            made["layer_types"] = kinds[: made.get("num_hidden_layers", len(kinds))]
    for name, sub in (getattr(kind, "sub_configs", None) or {}).items():
        words = name in ("text_config", "thinker_config", "llm_config", "decoder", "language_config")
        made[name] = _sub_settings(kind, name, sub, sight=not words)
    return made


def _like(field: inspect.Parameter, value: Any) -> Any:
    """A number as a list, where the class has a list of them."""
    if isinstance(value, list):
        return value
    if isinstance(field.default, (list, tuple)):
        return type(field.default)([value] * len(field.default))
    kinds = get_args(field.annotation) or (field.annotation,)
    lists = any(get_origin(kind) is list for kind in kinds) and int not in kinds
    return [value] * 2 if lists else value


def _layer_kinds(kind: type[Any]) -> list[str] | None:
    """Two layers: of the kinds that the class has by default, one each."""
    try:
        found = list(dict.fromkeys(kind().layer_types))
    except Exception:
        return None
    return ([found[0], found[-1]] if len(found) > 1 else found * 2) if found else None


def _sub_settings(kind: type[Any], name: str, sub: Any, *, sight: bool) -> dict[str, Any]:
    model_type = getattr(sub, "model_type", "")
    if not model_type:  # any class will do: the one that a default configuration has
        try:
            given = getattr(kind(), name)
        except Exception:
            return {}
        if given is None:
            return {}
        sub, model_type = type(given), given.model_type
    made = settings(sub, sight=sight)
    return {**made, "model_type": model_type} if model_type else made


def tiny_config(model_type: str, own: dict[str, Any] | None = None) -> Any:
    """A small configuration of a type.

    Args:
        model_type: as in `config.model_type`; own: values that differ from the small ones, dictionaries joined.

    Raises:
        Exception: whatever the class has against it.
    """
    kind = CONFIG_MAPPING[model_type]
    # Of their own: some classes complete the dictionaries that they are given.
    made = kind(**copy.deepcopy(_joined(_joined(settings(kind), OWN.get(model_type, {})), own or {})))
    for name in getattr(made, "sub_configs", None) or ():
        part = getattr(made, name, None)
        if hasattr(part, "architecture") and hasattr(part, "do_pooling"):  # of a wrapper around timm
            vars(made)[name] = _tower(part)  # a class may name the wrapper's for its own
    return made


def _tower(wrapped: Any) -> Any:
    """Another encoder of pictures, in place of one that would need a package of its own; text alone sees neither."""
    kind = CONFIG_MAPPING["siglip_vision_model"]
    made = kind(**settings(kind, sight=True))
    made.model_args = {"embed_dim": made.hidden_size, **(getattr(wrapped, "model_args", None) or {})}
    for name, value in vars(wrapped).items():  # what else the whole may ask of it
        if not hasattr(made, name):
            setattr(made, name, value)
    return made


def _joined(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    made = dict(one)
    for name, value in other.items():
        both = isinstance(value, dict) and isinstance(made.get(name), dict)
        made[name] = _joined(made[name], value) if both else value
    return made


def tiny_model(model_type: str, auto: Any, own: dict[str, Any] | None = None, attention: str = "eager") -> Any:
    """A random model in float32, without an end-of-text token; torch's generator is left as it was.

    Args:
        model_type, own: see `tiny_config`; auto: the class that makes a model from a configuration.
        attention: eager or sdpa.
    """
    config = tiny_config(model_type, own)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = _from_config(config, auto, attention).float().eval()
        head = model.get_output_embeddings()
        if head is not None:
            for parameter in head.parameters():  # a random model with tied embeddings repeats what it reads
                parameter.data = torch.randn(parameter.shape)
        words = getattr(_words_of(model), "weight", None)
        if words is not None:  # the padding's row is zero, to which every token that an indexer could choose is alike
            words.data[0] = 0.3 * torch.randn(words.shape[1])
    said = getattr(model, "generation_config", None)
    if said is not None:  # else it makes no text
        said.eos_token_id = said.forced_eos_token_id = None
        said.pad_token_id = 0
        if getattr(said, "decoder_start_token_id", 0) is None and not (
            model.config.is_encoder_decoder and said.bos_token_id is not None
        ):
            said.decoder_start_token_id = 0
    return model


def _from_config(config: Any, auto: Any, attention: str) -> Any:
    """A model of the class that the mapping names for a configuration, which may be of a larger whole."""
    kind = model_class(auto, config.model_type)
    wanted = kind.config_class
    if not isinstance(config, wanted):
        parts = (getattr(config, name, None) for name in getattr(config, "sub_configs", None) or ())
        config = next((part for part in parts if isinstance(part, wanted)), config)
    try:
        return kind._from_config(config, attn_implementation=attention)
    except ValueError:
        return kind._from_config(config)


def _words_of(model: Any) -> Any:
    try:
        return model.get_input_embeddings()
    except NotImplementedError:
        return None


@torch.no_grad()
def noisy(model: Any, scale: float, seed: int = 1) -> Any:
    """A copy whose weights are a little off; scale 0 for an exact one."""
    generator, other = torch.Generator().manual_seed(seed), copy.deepcopy(model)
    for parameter in other.parameters():
        if parameter.numel() > 1 and scale:
            parameter.add_(scale * parameter.std() * torch.randn(parameter.shape, generator=generator))
    return other


def prompts(rows: int, length: int = 9) -> dict[str, torch.Tensor]:
    """Random text with its mask; row r is padded on the left by 3r columns."""
    ids = torch.randint(3, IMAGE, (rows, length), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    for row in range(1, rows):
        mask[row, : 3 * row % (length - 1)] = 0
    return {"input_ids": ids * mask, "attention_mask": mask}


__all__ = ["IMAGE", "VOCABULARY", "noisy", "prompts", "settings", "tiny_config", "tiny_model"]
