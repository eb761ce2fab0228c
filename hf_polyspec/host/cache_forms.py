# SPDX-License-Identifier: Apache-2.0
"""The forms of keys and values, by which a caller's cache is known as another model's."""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

import torch
from transformers.cache_utils import Cache

from .offloaded import rests_elsewhere
from .release import GENERATION_CACHE, inner_model, with_cache
from .states import empty_cache

Form = tuple[Any, ...]
"""Of a layer: heads and size of its keys, the same of its values, dtype and device."""


def length_of(layer: Any) -> int:
    """Tokens a layer has read; 0 for one that reads another layer's keys and values."""
    return int(layer.get_seq_length()) if getattr(layer, "is_initialized", False) and layer.keys is not None else 0


def _form(layer: Any, away: bool = False) -> Form | None:
    if not length_of(layer):
        return None
    keys, values = layer.keys, layer.values
    device = layer.device if away else keys.device  # of an offloaded layer, where it is fetched to
    return keys.shape[1], keys.shape[3], values.shape[1], values.shape[3], keys.dtype, values.dtype, device


_forms: WeakKeyDictionary[Any, list[Form | None]] = WeakKeyDictionary()


def check_form(cache: Cache, model: Any, planned: list[Any] | None) -> None:
    """Refuse keys and values of another model, dtype or device.

    What the config lets expect, or what was measured before, is believed where it fits. Otherwise the target is asked:
    it reads one token into an empty cache.
    """
    found = _trimmed([_form(layer, rests_elsewhere(cache)) for layer in cache.layers])
    if found in (_expected(model, planned), _forms.get(model)):
        return
    true = _measured(model)
    if true is None or found == true:
        return
    for index in range(max(len(found), len(true))):
        one, other = (forms[index] if index < len(forms) else None for forms in (found, true))
        if one != other:
            raise ValueError(
                f"layer {index} of {GENERATION_CACHE} holds {_told(one)}, and the target keeps {_told(other)} there; "
                "pass a cache that this model has filled."
            )


def _trimmed(forms: list[Form | None]) -> list[Form | None]:
    while forms and forms[-1] is None:
        forms.pop()
    return forms


def _told(form: Form | None) -> str:
    if form is None:
        return "no tokens"
    heads, size, value_heads, value_size, dtype, _, device = form
    values = "" if (heads, size) == (value_heads, value_size) else f" (values {value_heads} of {value_size})"
    return f"{heads} heads of {size}{values} in {dtype} on {device}"


def _expected(model: Any, planned: list[Any] | None) -> list[Form | None] | None:
    """Forms as most models have them, by their config; None where it does not tell."""
    weight = getattr(inner_model(model).get_input_embeddings(), "weight", None)
    if planned is None or weight is None:
        return None
    place = weight.dtype, weight.dtype, weight.device
    config = inner_model(model).config.get_text_config(decoder=True)
    try:
        layers = getattr(config, "per_layer_config", None) or [config] * len(planned)
        shapes = [_shape(layer) for layer in layers]
    except Exception:  # a config of another kind
        return None
    return _trimmed(
        [
            (*shape, *shape, *place) if hasattr(layer, "get_seq_length") else None
            for layer, shape in zip(planned, shapes, strict=False)
        ]
    )


def _shape(config: Any) -> tuple[int, int]:
    """Heads of a layer's keys, and their size."""
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return int(heads), int(size)


@torch.no_grad()
def _measured(model: Any) -> list[Form | None] | None:
    """Forms of what the model keeps of one token; None where it cannot be asked."""
    cache = empty_cache(model)
    weight = getattr(model.get_input_embeddings(), "weight", None)
    device = "cpu" if weight is None else weight.device
    try:
        model(input_ids=torch.zeros(1, 1, dtype=torch.long, device=device), use_cache=True, **with_cache(model, cache))
    except Exception:
        return None
    _forms[model] = _trimmed([_form(layer) for layer in cache.layers])
    return _forms[model]
