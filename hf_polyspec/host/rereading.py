# SPDX-License-Identifier: Apache-2.0
"""A runner for models that keep nothing of what they have read, such as the first GPT.

Plain generation has them read the whole text for every token. So does every pass here, which checks a draft besides.
"""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

import torch

from ..exactness.context import Context
from ..telemetry.counters import LevelStats
from .carried import carried_by
from .release import cache_argument, forward_arguments, inner_model, input_device
from .runner import ModelRunner

_SAID = {"logits", "loss", "hidden_states", "attentions"}
"""What such a model returns; anything else might be what it has read."""
_TEXT, _FEWER = [5, 2, 4, 3, 1, 6], 3
_known: WeakKeyDictionary[Any, bool] = WeakKeyDictionary()


class RereadingRunner(ModelRunner):
    """A `ModelRunner` without a cache, whatever is asked for."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **{**options, "use_cache": False})

    def settle(self, context: Context, stats: LevelStats) -> None:
        """There is nothing to bring up to date."""


def rereads(model: Any) -> bool:
    """Whether a model has no cache in any form, and says the same of a text whatever follows it; asked once."""
    inner = inner_model(model)
    if inner not in _known:
        own = cache_argument(model) is not None or carried_by(model).any or input_device(model).type == "meta"
        _known[inner] = not own and _tried(inner)
    return _known[inner]


@torch.no_grad()
def _tried(inner: Any) -> bool:
    ids = torch.tensor([_TEXT], device=input_device(inner))
    more = {"use_cache": True} if "use_cache" in forward_arguments(inner) else {}
    devices = [ids.device] if ids.device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices=devices):
            whole, part = (inner(input_ids=each, return_dict=True, **more) for each in (ids, ids[:, :_FEWER]))
        found, wanted = whole.logits[:, :_FEWER].float(), part.logits.float()
    except Exception:
        return False
    coarse = 1e-4 if inner.dtype in (torch.float32, torch.float64) else 3e-2
    alike = found.shape == wanted.shape and bool((found - wanted).abs().max() <= coarse * wanted.abs().max())
    return alike and set(whole) <= _SAID
