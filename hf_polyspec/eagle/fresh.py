# SPDX-License-Identifier: Apache-2.0
"""A fresh, untrained head for any target."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from hf_polyspec.eagle.configuration import EagleHeadConfig
from hf_polyspec.eagle.features import TargetParts, bind, default_layers, target_parts
from hf_polyspec.eagle.modeling import EagleHead


def init_for(
    target_model: PreTrainedModel,
    algorithm: str = "eagle3",
    draft_vocab: torch.Tensor | list[int] | None = None,
    *,
    own_lm_head: bool | None = None,
    dtype: torch.dtype | None = None,
    **config_overrides: Any,
) -> EagleHead:
    """Makes an untrained head for a target, bound to it.

    The head's own layer is always of the Llama type, whatever the target is. Its sizes come from the target's
    text config. An EAGLE-3 head may be narrower (`hidden_size=`): it then has an embedding of its own, which
    starts as the target's projected onto its principal directions.

    Args:
        target_model: Any transformers decoder-only causal language model.
        algorithm: `"eagle1"` or `"eagle3"`.
        draft_vocab: Target ids the head shall score, distinct; `None` means all. Kept in ascending order.
        own_lm_head: Whether the head trains an lm_head of its own (default for EAGLE-3, where it starts as a
            copy of the target's rows) or scores with the target's frozen rows (default for EAGLE-1).
        dtype: Of the head's weights; default the target's.
        **config_overrides: Any field of `EagleHeadConfig`.

    Returns:
        The head, bound to the target, in training mode on the device of the target's lm_head.

    Raises:
        ValueError: If the target cannot carry such a head.
        TypeError: If the target has no embedding or lm_head.
    """
    parts = target_parts(target_model)
    ids = _draft_ids(draft_vocab, parts.vocab_size)
    config_overrides.setdefault("draft_vocab_size", parts.vocab_size if ids is None else len(ids))
    if own_lm_head is not None:
        config_overrides.setdefault("own_lm_head", own_lm_head)
    config = config_for(target_model, algorithm, **config_overrides)
    _refuse_narrow(config, parts)
    head = EagleHead(config)
    if ids is not None and config.maps_vocabulary:
        head.d2t.copy_(ids - torch.arange(len(ids)))
    if config.own_embedding:
        _project_embedding(head, parts)
    bind(head, target_model)
    _copy_lm_head(head, parts, ids)
    device = parts_device(parts)
    nn.Module.to(head, device=device, dtype=dtype or _compute_dtype(target_model))
    head.train()
    return head


def config_for(target_model: PreTrainedModel, algorithm: str = "eagle3", **overrides: Any) -> EagleHeadConfig:
    """The config of an untrained head, as `init_for` makes it.

    Args:
        target_model: Any transformers decoder-only causal language model.
        algorithm: `"eagle1"` or `"eagle3"`.
        **overrides: Any field of `EagleHeadConfig`.
    """
    parts = target_parts(target_model)
    fields = _fields_from_target(target_model, parts, algorithm, overrides.get("hidden_size"))
    config = EagleHeadConfig(**{**fields, **overrides})
    if config.feature_layer_ids is None:
        config.feature_layer_ids = spread_layers(config, parts.num_layers)
    return config


def with_whole_vocabulary(head: EagleHead) -> EagleHead:
    """The same head scoring all of its target's ids, with the target's rows.

    Args:
        head: a head, bound or not.

    Returns:
        A new head that shares the old one's weights and is not bound; the old one if it scores all ids already.

    Raises:
        ValueError: the head's own lm_head knows no other ids.
    """
    if not head.config.maps_vocabulary:
        return head
    if head.config.own_lm_head:
        raise ValueError(
            f"A head with an lm_head of its own scores the {head.config.draft_vocab_size} ids it was trained for; "
            "leave draft_vocab_size as it was."
        )
    config = EagleHeadConfig(**{**head.config.to_dict(), "draft_vocab_size": head.config.vocab_size})
    whole = EagleHead(config)
    weights = {name: value for name, value in head.state_dict().items() if name != "d2t"}
    whole.load_state_dict(weights, assign=True)
    return whole


def spread_layers(config: EagleHeadConfig, num_layers: int) -> list[int]:
    """Returns which hidden states a fresh head reads: the published places where the target is deep enough.

    A target of fewer than six layers, or another number of features, gets depths spread evenly from 0 to L-1.

    Args:
        config: The head's config.
        num_layers: Decoder layers of the target, L.

    Returns:
        Indices into the target's `hidden_states`.
    """
    count = config.num_features or 1
    if config.algorithm == "eagle1" or not config.has_fc or (count == 3 and num_layers >= 6):
        return default_layers(config, num_layers)
    return [round(index * (num_layers - 1) / max(count - 1, 1)) for index in range(count)]


def _refuse_narrow(config: EagleHeadConfig, parts: TargetParts) -> None:
    if config.hidden_size != parts.hidden_size and not config.own_lm_head:
        raise ValueError("A head of another width than its target needs its own lm_head (own_lm_head=True).")


@torch.no_grad()
def _project_embedding(head: EagleHead, parts: TargetParts) -> None:
    """Starts the head's own embedding as the best linear compression of the target's (principal axes)."""
    weight = getattr(parts.embed_tokens, "weight", None)
    if not torch.is_tensor(weight) or not weight.is_floating_point() or weight.device.type == "meta":
        return
    own = head.embed_tokens.weight
    rows = weight.detach().float()[: own.shape[0]]
    if own.shape[1] >= rows.shape[1]:
        return
    # eigenvalues ascend: the last columns are the widest directions
    _, axes = torch.linalg.eigh(rows.T @ rows)
    own.copy_(rows @ axes[:, -own.shape[1] :])


def _fields_from_target(
    model: PreTrainedModel, parts: TargetParts, algorithm: str, wanted_size: int | None
) -> dict[str, Any]:
    text = model.config.get_text_config(decoder=True)
    own_size = parts.hidden_size if algorithm == "eagle1" else parts.embedding_size
    size = wanted_size or own_size
    heads, kv_heads, head_dim = _attention_split(text, size)
    inner = getattr(text, "intermediate_size", None) or getattr(text, "n_inner", None) or 4 * size
    return {
        "algorithm": algorithm,
        "vocab_size": parts.vocab_size,
        "hidden_size": size,
        "target_hidden_size": parts.hidden_size,
        "intermediate_size": inner if isinstance(inner, int) else 4 * size,
        "own_embedding": size != parts.embedding_size,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "max_position_embeddings": getattr(text, "max_position_embeddings", None) or 2048,
        "rms_norm_eps": getattr(text, "rms_norm_eps", None) or 1e-6,
        "initializer_range": getattr(text, "initializer_range", None) or 0.02,
        "pad_token_id": getattr(text, "pad_token_id", None),
        "bos_token_id": getattr(text, "bos_token_id", None),
        "eos_token_id": getattr(text, "eos_token_id", None),
    }


def _attention_split(text: Any, size: int) -> tuple[int, int, int]:
    """Returns query heads, key-value heads and an even head width for a head of the given width."""
    heads = getattr(text, "num_attention_heads", None) or max(1, size // 64)
    heads = heads if isinstance(heads, int) else max(1, size // 64)
    kv_heads = getattr(text, "num_key_value_heads", None)
    head_dim = getattr(text, "head_dim", None)
    kv_heads = kv_heads if isinstance(kv_heads, int) and kv_heads > 0 and heads % kv_heads == 0 else heads
    head_dim = head_dim if isinstance(head_dim, int) else size // heads
    if head_dim < 2 or head_dim % 2:
        head_dim += head_dim % 2 or 2
    return heads, kv_heads, head_dim


def _draft_ids(draft_vocab: torch.Tensor | list[int] | None, vocab_size: int) -> torch.Tensor | None:
    if draft_vocab is None:
        return None
    ids = torch.as_tensor(draft_vocab, dtype=torch.long).flatten().cpu()
    if not len(ids) or int(ids.min()) < 0 or int(ids.max()) >= vocab_size:
        raise ValueError(f"draft_vocab must hold ids of the target's vocabulary of {vocab_size}.")
    if len(set(ids.tolist())) != len(ids):
        raise ValueError("draft_vocab lists an id twice.")
    return ids.sort().values


def _copy_lm_head(head: EagleHead, parts: TargetParts, ids: torch.Tensor | None) -> None:
    """Starts the head's own lm_head from the target's rows, where they can be read and fit."""
    weight = getattr(parts.lm_head, "weight", None)
    if not head.config.own_lm_head or not torch.is_tensor(weight) or not weight.is_floating_point():
        return
    rows = weight.detach() if ids is None else weight.detach()[ids.to(weight.device)]
    if rows.shape == head.lm_head.weight.shape and rows.device.type != "meta":
        head.lm_head.weight.data.copy_(rows)


def parts_device(parts: TargetParts) -> torch.device:
    """Returns where a head of this target should live: beside its lm_head."""
    weight = getattr(parts.lm_head, "weight", None)
    device = weight.device if torch.is_tensor(weight) else torch.device("cpu")
    return torch.device("cpu") if device.type == "meta" else device


def _compute_dtype(model: PreTrainedModel) -> torch.dtype:
    dtype = model.dtype
    return dtype if dtype.is_floating_point else torch.float32
