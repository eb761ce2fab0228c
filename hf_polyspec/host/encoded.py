# SPDX-License-Identifier: Apache-2.0
"""What the decoder of an encoder-decoder model is given besides its own ids: the encoder's outputs and their mask."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from transformers.cache_utils import Cache, DynamicLayer, EncoderDecoderCache
from transformers.modeling_outputs import BaseModelOutput

from ..errors import TARGET, UncheckableError
from .lending import is_copy
from .release import (
    GENERATION_CACHE,
    cache_names,
    cache_of,
    forward_arguments,
    inner_model,
    input_device,
    parameters_of,
)

_DECODERS = {"decoder_attention_mask": "attention_mask", "decoder_position_ids": "position_ids"}
"""Arguments of the decoder, and what they are called where there is no encoder."""
_COMMON = {"use_cache", "logits_to_keep", "output_attentions", "output_hidden_states", "return_dict", "labels"}
_NO_INPUTS = -100  # what generate() fills inputs with where only encoder outputs were given


@dataclass(frozen=True)
class Encoded:
    """What one model's decoder attends to.

    Attributes:
        outputs: the encoder's; states `[B, S, H]`, rows repeated for `num_return_sequences`.
        mask: `[B, S]` or None.
        always: further arguments of every pass, by name.
        inputs: what the encoder has read, rows not repeated; None where only its outputs were given.
        crossed: keys and values of the outputs that a caller's cache holds for the target, by layer; None for none.
    """

    outputs: Any
    mask: torch.Tensor | None
    always: dict[str, Any] = field(default_factory=dict)
    inputs: torch.Tensor | None = None
    crossed: Cache | None = None

    @property
    def states(self) -> torch.Tensor:
        """`[B, S, H]`, the encoder's last hidden states."""
        found: torch.Tensor = self.outputs[0]
        return found

    def select(self, rows: list[int]) -> Encoded:
        """Only these rows of the batch."""
        batch = self.states.shape[0]
        kept = {name: _rows(value, rows, batch) for name, value in self.outputs.items()}
        always = {name: _rows(value, rows, batch) for name, value in self.always.items()}
        mask = None if self.mask is None else self.mask[rows]
        return replace(self, outputs=type(self.outputs)(**kept), mask=mask, always=always, crossed=None)


def _rows(value: Any, rows: list[int], batch: int) -> Any:
    if isinstance(value, (tuple, list)):
        return type(value)(_rows(one, rows, batch) for one in value)
    own = isinstance(value, torch.Tensor) and value.dim() > 0 and value.shape[0] == batch
    return value[rows] if own else value


def is_encoder_decoder(model: Any) -> bool:
    """Whether a model has an encoder of its own."""
    return bool(getattr(inner_model(model).config, "is_encoder_decoder", False))


def attends_to_encoder(model: Any) -> bool:
    """Whether a model without an encoder takes another one's outputs, as the decoder of a distilled Whisper does."""
    return not is_encoder_decoder(model) and "encoder_outputs" in forward_arguments(model)


def decoder_part(cache: Any) -> Any:
    """The decoder's own keys and values of a cache that may hold an encoder's beside them."""
    return cache.self_attention_cache if isinstance(cache, EncoderDecoderCache) else cache


def _crossed_part(cache: Any) -> Cache | None:
    """The encoder's keys and values of a caller's cache, rows of which may be picked; None where it is empty.

    Raises:
        UncheckableError: they lie in layers that are not known.
    """
    if not isinstance(cache, EncoderDecoderCache) or not cache.get_seq_length():
        return None
    held = cache.cross_attention_cache
    odd = next((layer for layer in held.layers if type(layer) is not DynamicLayer), None)
    if odd is not None:
        raise UncheckableError(
            f"{GENERATION_CACHE} of type {type(cache).__name__} has {type(odd).__name__} layers for what the encoder "
            f"said, from where a chain cannot go on; pass DynamicCaches, or leave {GENERATION_CACHE} out.",
            TARGET,
        )
    made = copy.copy(held)
    made.layers = [copy.copy(layer) for layer in held.layers]
    return made


def take_encoded(model: Any, given: Mapping[str, Any]) -> tuple[Encoded | None, dict[str, Any]]:
    """Split generate()'s arguments into what the decoder attends to and what it continues.

    Args:
        model: the target; given: as generate() prepared them, `inputs_tensor` among them, what its encoder has read.

    Returns:
        None and the arguments as they are where the target has no encoder; else the arguments of the decoder alone, by
        the names that they have in models without one.

    Raises:
        UncheckableError: embeddings for the decoder, whose ids a chain does not know, or a cache that it cannot follow.
    """
    inputs = given.get("inputs_tensor")
    given = {name: value for name, value in given.items() if name != "inputs_tensor"}
    if not is_encoder_decoder(model):
        return None, given
    if given.get("decoder_inputs_embeds") is not None:
        raise UncheckableError(
            "decoder_inputs_embeds is not supported with assistant_models; pass decoder_input_ids.", TARGET
        )
    kept = {name: value for name, value in given.items() if name in _COMMON or name in cache_names(given)}
    kept |= {other: given[name] for name, other in _DECODERS.items() if given.get(name) is not None}
    beside = {*kept, *_DECODERS, *_COMMON, "encoder_outputs", "attention_mask"}
    always = {name: value for name, value in given.items() if name not in beside and value is not None}
    known = isinstance(inputs, torch.Tensor) and not bool((inputs == _NO_INPUTS).all())
    outputs = given["encoder_outputs"]
    if isinstance(outputs, torch.Tensor):
        outputs = (outputs,)
    if isinstance(outputs, (tuple, list)):
        outputs = BaseModelOutput(*outputs)
    crossed = _crossed_part(cache_of(given))
    return Encoded(outputs, given.get("attention_mask"), always, inputs if known else None, crossed), kept


def encoded_for(assistant: Any, target: Any, encoded: Encoded, role: str) -> Encoded:
    """What an assistant's decoder attends to.

    The target's own, where the assistant has no encoder or is a copy of the target; else its own encoder reads the
    inputs, once.

    Raises:
        ValueError: the target's encoder has another width, or the inputs are not known.
    """
    if not is_encoder_decoder(assistant):
        width = getattr(assistant.config.get_text_config(decoder=True), "hidden_size", None)
        if width != encoded.states.shape[-1]:
            raise ValueError(
                f"{role} attends to encoder states of width {width}, and those of the target have "
                f"{encoded.states.shape[-1]}; load it with its own encoder."
            )
        return _moved(Encoded(encoded.outputs, encoded.mask), assistant)
    if assistant is target or is_copy(assistant, target):
        return _moved(replace(encoded, inputs=None, crossed=None), assistant)
    if encoded.inputs is None:
        raise ValueError(
            f"{role} has an encoder of its own, and encoder_outputs are those of the target; pass the inputs instead."
        )
    alike = type(inner_model(assistant)) is type(inner_model(target))
    return _read(assistant, encoded, encoded.always if alike else {}, role)


def _read(model: Any, encoded: Encoded, always: Mapping[str, Any], role: str) -> Encoded:
    """The outputs of a model's own encoder, with rows repeated as the target's are."""
    assert encoded.inputs is not None
    encoder, device = inner_model(model).get_encoder(), input_device(model)
    inputs = encoded.inputs.to(device)
    name = inner_model(model).main_input_name
    if name == "input_ids" and inputs.is_floating_point():
        name = "inputs_embeds"
    repeats = encoded.states.shape[0] // inputs.shape[0]
    more: dict[str, Any] = {**always, "attention_mask": encoded.mask}
    taken = parameters_of(encoder.forward)
    wanted = {
        key: _rows(value, [*range(0, encoded.states.shape[0], repeats)], encoded.states.shape[0])
        for key, value in more.items()
        if key in taken and value is not None
    }
    try:
        outputs = encoder(**{name: inputs}, **wanted, return_dict=True)
    except Exception as error:
        raise ValueError(f"{role} has an encoder of its own, which could not read the inputs: {error}") from error
    rows = [row for row in range(inputs.shape[0]) for _ in range(repeats)]
    made = Encoded(outputs, None, dict(always), None).select(rows)
    mask = encoded.mask
    # A mask of what the encoder has read is one of its outputs too, where it keeps their number.
    return _moved(replace(made, always=dict(always), mask=mask), model)


def _moved(encoded: Encoded, model: Any) -> Encoded:
    device = input_device(model)
    moved = {name: _on(value, device) for name, value in encoded.outputs.items()}
    mask = None if encoded.mask is None else encoded.mask.to(device)
    return replace(encoded, outputs=type(encoded.outputs)(**moved), mask=mask)


def _on(value: Any, device: torch.device) -> Any:
    if isinstance(value, (tuple, list)):
        return type(value)(_on(one, device) for one in value)
    return value.to(device) if isinstance(value, torch.Tensor) else value
