# SPDX-License-Identifier: Apache-2.0
"""Prompts that come as the target's embeddings: which of the other levels can make something of them."""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

import torch

from .pictures import PLACES
from .release import inner_model, input_device

_known: WeakKeyDictionary[Any, bool] = WeakKeyDictionary()


def reads_any(model: Any) -> bool:
    """Whether a model reads embeddings that are not of its own ids; asked once.

    Gemma 4 looks the ids up from which an embedding was made, and finds none of another model's.
    """
    inner = inner_model(model)
    if inner not in _known:
        _known[inner] = input_device(model).type == "meta" or _tried(inner, input_device(model))
    return _known[inner]


@torch.no_grad()
def _tried(inner: Any, device: torch.device) -> bool:
    words = inner.get_input_embeddings().weight
    given = torch.full((1, 2, words.shape[-1]), 0.5, dtype=inner.dtype, device=device)
    devices = [device] if device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices=devices):
            inner(inputs_embeds=given)
    except Exception:
        return False
    return True


def same_places(model: Any, target: Any) -> bool:
    """Whether a model embeds what stands for a picture as the target does, and so finds it in the target's prompt."""
    inner, other = inner_model(model), inner_model(target)
    words, others = (one.get_input_embeddings().weight for one in (inner, other))
    places = {place for name in PLACES if isinstance(place := getattr(other.config, name, None), int)}
    held = [place for place in sorted(places) if place < min(len(words), len(others))]
    return bool(torch.equal(words[held], others[held].to(words.device, words.dtype)))
