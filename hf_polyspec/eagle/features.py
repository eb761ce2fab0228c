# SPDX-License-Identifier: Apache-2.0
"""What a head needs of a target: features, embedding and lm_head, found without copying anything."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from hf_polyspec.eagle.configuration import LAST_HIDDEN_STATE, EagleHeadConfig
from hf_polyspec.eagle.modeling import EagleHead
from hf_polyspec.eagle.vocabulary import module_shape
from hf_polyspec.host.whole import lent_parts, whole_part, whole_part_in_all


@dataclass(frozen=True)
class TargetParts:
    """What a head may use of a target.

    Args:
        embed_tokens: The target's input embedding module.
        lm_head: The target's output projection.
        hidden_size: Width of its hidden states, H_t.
        embedding_size: Width of its embeddings.
        vocab_size: Rows of its embedding, V.
        num_layers: Decoder layers, L.
        logit_scale: Factor applied to the lm_head's output.
        logit_softcap: Final soft cap of the logits, or `None`.
    """

    embed_tokens: nn.Module
    lm_head: nn.Module
    hidden_size: int
    embedding_size: int
    vocab_size: int
    num_layers: int
    logit_scale: float
    logit_softcap: float | None


def target_parts(model: PreTrainedModel) -> TargetParts:
    """Finds the embedding and lm_head of any decoder-only model.

    Args:
        model: A transformers causal language model.

    Returns:
        Its parts; the modules are the model's own.

    Raises:
        TypeError: If the model has no input embedding or no output projection, or is an encoder-decoder.
        ValueError: If its config does not tell its width or depth.
    """
    name = type(model).__name__
    if getattr(model.config, "is_encoder_decoder", False):
        raise TypeError(f"{name} is an encoder-decoder; EAGLE heads work with decoder-only models.")
    embed_tokens, lm_head = (None if part is None else whole_part(part) for part in lent_parts(model))
    if embed_tokens is None or lm_head is None:
        missing = "input embedding" if embed_tokens is None else "output projection (lm_head)"
        raise TypeError(f"{name} has no {missing} that an EAGLE head could use.")
    text = model.config.get_text_config(decoder=True)
    hidden_size = getattr(text, "hidden_size", None)
    num_layers = getattr(text, "num_hidden_layers", None)
    rows, width = module_shape(embed_tokens)
    vocab_size = rows if rows is not None else getattr(text, "vocab_size", None)
    if hidden_size is None or num_layers is None or vocab_size is None:
        raise ValueError(f"The config of {name} tells no hidden_size, num_hidden_layers or vocab_size.")
    return TargetParts(
        embed_tokens=embed_tokens,
        lm_head=lm_head,
        hidden_size=hidden_size,
        embedding_size=width if width is not None else hidden_size,
        vocab_size=vocab_size,
        num_layers=num_layers,
        logit_scale=_logit_scale(text),
        logit_softcap=getattr(text, "final_logit_softcapping", None),
    )


def lend_parts(model: PreTrainedModel, *, keeps: bool, everywhere: bool = False) -> None:
    """Puts together what a head may use of a model that is sharded over processes; collective.

    Args:
        model: The level above the head; keeps: Whether a head runs in this process.
        everywhere: Whether one runs in every process.
    """
    for part in lent_parts(model):
        if part is None:
            continue
        if everywhere:
            whole_part_in_all(part)
        else:
            whole_part(part, keeps=keeps)


def _logit_scale(config: Any) -> float:
    """Returns the factor on the lm_head's output: Cohere's `logit_scale`, 1 / Granite's `logits_scaling`."""
    scale = getattr(config, "logit_scale", None)
    divisor = getattr(config, "logits_scaling", None)
    if isinstance(scale, (int, float)):
        return float(scale)
    return 1.0 / float(divisor) if isinstance(divisor, (int, float)) and divisor else 1.0


def bind(head: EagleHead, model: PreTrainedModel) -> EagleHead:
    """Lends a head the embedding and lm_head of the model whose features it will read.

    Args:
        head: The head.
        model: The level directly above it (the target or a middle).

    Returns:
        The head itself.

    Raises:
        ValueError: In one sentence, why the head does not fit this model.
        TypeError: If the model has no embedding or lm_head.
    """
    parts = target_parts(model)
    check_fit(head.config, parts, type(model).__name__)
    return head.bind(
        parts.embed_tokens,
        parts.lm_head,
        logit_scale=parts.logit_scale,
        logit_softcap=parts.logit_softcap,
        name=str(getattr(model, "name_or_path", "") or ""),
        architectures=(type(model).__name__,),
    )


def view_of(head: EagleHead) -> EagleHead:
    """A head of the same weights that can be bound to another target; the given one stays bound to its own."""
    view = copy.copy(head)
    # what binding may change is the view's own
    view._modules = dict(head._modules)
    view.config = copy.copy(head.config)
    return view


def check_fit(config: EagleHeadConfig, parts: TargetParts, name: str) -> None:
    """Raises unless a head's config fits a target.

    Args:
        config: The head's config.
        parts: The target's parts.
        name: The target's name, for the message.

    Raises:
        ValueError: In one sentence, what differs.
    """
    if config.target_hidden_size != parts.hidden_size:
        raise ValueError(
            f"This EAGLE head reads features {config.target_hidden_size} wide; the hidden states of {name} "
            f"are {parts.hidden_size} wide."
        )
    feature_layers(config, parts.num_layers)


def feature_layers(config: EagleHeadConfig, num_layers: int) -> list[int]:
    """Returns which entries of a target's `hidden_states` a head reads, in order.

    EAGLE-1 reads the state that the lm_head reads, `[-1]`; EAGLE-3 the un-normed inputs of layers 2, L//2 and
    L-3 unless its config lists others. Pass the list as `output_hidden_states=` to the target: transformers
    then keeps those states only (older models return all).

    Args:
        config: The head's config.
        num_layers: Decoder layers of the target, L.

    Returns:
        Indices into `hidden_states`, where 0 is the embedding output; -1 means the last entry.

    Raises:
        ValueError: If the target is too shallow.
    """
    listed = config.feature_layer_ids
    if listed is None:
        listed = default_layers(config, num_layers)
    elif config.unsettled_layer_ids is not None and max(listed) > num_layers:
        # outputs of layers that this target does not have: then the numbers are states, as they stand
        listed = config.unsettled_layer_ids
    outside = [index for index in listed if not (0 <= index < num_layers or index == LAST_HIDDEN_STATE)]
    if outside:
        guessed = config.unsettled_layer_ids not in (None, list(listed))
        told = f"{list(listed)} (its file lists {config.unsettled_layer_ids})" if guessed else str(list(listed))
        last = ": what its last layer gives is there after the final norm only" if outside[0] == num_layers else ""
        raise ValueError(
            f"This EAGLE head reads hidden states {told}; a target of {num_layers} layers has no "
            f"un-normed hidden state {outside[0]}{last}."
        )
    return list(listed)


def default_layers(config: EagleHeadConfig, num_layers: int) -> list[int]:
    """Returns the hidden states that a published head reads by default; see `feature_layers`."""
    if config.algorithm == "eagle1" or not config.has_fc:
        return [LAST_HIDDEN_STATE]
    if config.num_features != 3:
        raise ValueError(
            f"This EAGLE head reads {config.num_features} hidden states and does not say which; set feature_layer_ids."
        )
    return [2, num_layers // 2, num_layers - 3]


def select_features(hidden_states: Sequence[torch.Tensor | None], layers: Sequence[int]) -> torch.Tensor:
    """Concatenates the hidden states a head reads.

    Args:
        hidden_states: The target's `hidden_states`, L + 1 tensors `[B, T, H_t]`; those not asked for may be
            `None`.
        layers: Indices from `feature_layers`.

    Returns:
        `[B, T, num_features * H_t]`, for `EagleHead.fuse`.

    Raises:
        ValueError: If the target did not return one of them, or returned another kind of state.
    """
    picked = [hidden_states[index] for index in layers]
    present = [state for state in picked if state is not None]
    if len(present) != len(picked):
        raise ValueError(f"The target returned no hidden state at some of {list(layers)}.")
    for state in present:
        if state.dim() != 3:
            raise ValueError(
                f"The target's hidden states have shape {list(state.shape)}; an EAGLE head reads "
                "[batch, tokens, width]."
            )
    return present[0] if len(present) == 1 else torch.cat([s.to(present[0].device) for s in present], dim=-1)
