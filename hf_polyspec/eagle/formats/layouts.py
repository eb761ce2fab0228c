# SPDX-License-Identifier: Apache-2.0
"""The published layouts of EAGLE heads, read into one: names, vocabulary maps, and the accounting of keys.

| layout | names | read |
| --- | --- | --- |
| EAGLE-1/2 official | `fc`, `layers.0` | yes |
| EAGLE-3 official, SpecForge | `fc`, `midlayer`, `norm`, `lm_head`, `d2t`, `t2d` | yes |
| ModelOpt | official, or `layers.0`, `eagle_config` in the config | yes |
| speculators EAGLE-1 0.1 | `fusion_fc`, `transformer`, optional norms | yes |
| speculators EAGLE-3 | official with `layers.0` | yes |
"""

from __future__ import annotations

import re
from typing import Any

import torch

from hf_polyspec.eagle.configuration import EagleHeadConfig
from hf_polyspec.eagle.formats.config import Tensors, derive_config
from hf_polyspec.eagle.modeling import EagleHead

_PREFIXES = ("model.", "eagle_module.")
_RENAMES = (
    (re.compile(r"^(midlayer|transformer)\."), "layers.0."),
    (re.compile(r"^fusion_fc\."), "fc."),
    (re.compile(r"^embedding_layernorm\."), "embed_layernorm."),
    (re.compile(r"^(pre_lm_head_layernorm|lm_head_layernorm)\."), "norm."),
    (re.compile(r"^hidden_layernorm\."), "layers.0.input_layernorm."),
    (re.compile(r"^input_embeds_norm\."), "layers.0.input_layernorm."),
    (re.compile(r"^hidden_norm\."), "layers.0.hidden_norm."),
    (re.compile(r"^eagle_lm_head\."), "lm_head."),
    (re.compile(r"^draft_id_to_target_id$"), "d2t"),
)
# Buffers that other trainers store and that nothing here needs.
_IGNORED = re.compile(r"(^|\.)rotary_emb\.|^verifier_|^verifier\.")


def canonical_names(tensors: Tensors) -> Tensors:
    """Renames a checkpoint's tensors to the names of `EagleHead`, leaving out what is known to be needless.

    Args:
        tensors: Tensors as stored.

    Returns:
        Tensors by canonical name; `t2d` is kept (it can stand in for a missing `d2t`).

    Raises:
        ValueError: If two keys mean the same weight.
    """
    renamed: Tensors = {}
    origin: dict[str, str] = {}
    for stored, tensor in tensors.items():
        name = stored
        for prefix in _PREFIXES:
            name = name.removeprefix(prefix)
        for pattern, replacement in _RENAMES:
            name = pattern.sub(replacement, name)
        if _IGNORED.search(name):
            continue
        if name in renamed:
            raise ValueError(f"The keys {origin[name]} and {stored} of the checkpoint mean the same weight.")
        renamed[name] = tensor
        origin[name] = stored
    return renamed


def convert(
    config: dict[str, Any], tensors: Tensors, overrides: dict[str, Any] | None = None
) -> tuple[EagleHeadConfig, Tensors]:
    """Turns a published checkpoint into a config and a state dict of `EagleHead`.

    Args:
        config: Its `config.json`.
        tensors: Its tensors, as stored.
        overrides: Fields of `EagleHeadConfig` that the user knows better.

    Returns:
        The config and the state dict.

    Raises:
        ValueError: If keys are missing, unexpected or misshapen, or a variant is not supported.
    """
    named = canonical_names(tensors)
    member = named.pop("t2d", None)
    named = _with_tied_lm_head(_with_mapping(named, member), config)
    fields = derive_config(config, named, vocab_size=None if member is None else len(member))
    named = _without_identity(named, fields)
    if overrides and "feature_layer_ids" in overrides:
        fields["unsettled_layer_ids"] = None
    head_config = EagleHeadConfig(**{**fields, **(overrides or {})})
    account(head_config, named)
    if head_config.maps_vocabulary:
        check_mapping(named["d2t"], head_config)
    return head_config, named


def _with_mapping(tensors: Tensors, member: torch.Tensor | None) -> Tensors:
    """Makes `d2t` an integer tensor, deriving it from the membership `t2d`, `[V]`, where it is missing."""
    tensors = dict(tensors)
    if member is not None and "d2t" not in tensors and not bool(member.bool().all()):
        ids = member.bool().nonzero().flatten()
        tensors["d2t"] = ids - torch.arange(len(ids))
    if "d2t" in tensors:
        tensors["d2t"] = tensors["d2t"].long()
    return tensors


def _with_tied_lm_head(tensors: Tensors, config: dict[str, Any]) -> Tensors:
    """Gives a head that is tied to an embedding of its own the lm_head that its file leaves out for that reason."""
    embedding, fused = tensors.get("embed_tokens.weight"), tensors.get("layers.0.input_layernorm.weight")
    mapped, tied = "d2t" in tensors, config.get("tie_word_embeddings") is True
    # EAGLE-1 files hold an embedding and no lm_head as well, and mean the target's
    eagle3 = fused is not None and "layers.0.hidden_norm.weight" in tensors
    if embedding is None or "lm_head.weight" in tensors or mapped or not (tied and eagle3):
        return tensors
    return {**tensors, "lm_head.weight": embedding.clone()}


def _without_identity(tensors: Tensors, fields: dict[str, Any]) -> Tensors:
    """Drops a `d2t` that maps every id to itself.

    Raises:
        ValueError: If it covers the whole vocabulary but moves ids.
    """
    mapping = tensors.get("d2t")
    if mapping is None or fields["draft_vocab_size"] != fields["vocab_size"]:
        return tensors
    if bool(mapping.any()):
        raise ValueError("The head scores the whole vocabulary, yet its d2t moves ids.")
    return {name: tensor for name, tensor in tensors.items() if name != "d2t"}


def check_mapping(d2t: torch.Tensor, config: EagleHeadConfig) -> None:
    """Raises unless `d2t` holds offsets that take the head's ids to distinct target ids.

    Args:
        d2t: `[Vd]`, target id minus draft id.
        config: The head's config.

    Raises:
        ValueError: If an id lands outside the vocabulary or two land on the same.
    """
    ids = d2t.cpu() + torch.arange(len(d2t))
    if int(ids.min()) < 0 or int(ids.max()) >= config.vocab_size or len(torch.unique(ids)) != len(ids):
        raise ValueError(f"d2t does not hold offsets into a vocabulary of {config.vocab_size} (target id - draft id).")


def account(config: EagleHeadConfig, tensors: Tensors) -> None:
    """Raises unless the tensors are exactly the weights of the head that a config describes.

    Args:
        config: The head's config.
        tensors: Canonically named tensors.

    Raises:
        ValueError: Listing every missing, unexpected and misshapen key.
    """
    with torch.device("meta"):
        expected = {name: tensor.shape for name, tensor in EagleHead(config).state_dict().items()}
    missing = sorted(expected.keys() - tensors.keys())
    unexpected = sorted(tensors.keys() - expected.keys())
    misshapen = [
        f"{name} is {list(tensors[name].shape)}, should be {list(shape)}"
        for name, shape in sorted(expected.items())
        if name in tensors and tensors[name].shape != shape
    ]
    parts = []
    if missing:
        parts.append(f"missing keys: {', '.join(missing)}")
    if unexpected:
        parts.append(f"unexpected keys: {', '.join(unexpected)}")
    if misshapen:
        parts.append(f"misshapen: {', '.join(misshapen)}")
    if parts:
        raise ValueError(f"This {config.algorithm} checkpoint does not add up; {'; '.join(parts)}.")
