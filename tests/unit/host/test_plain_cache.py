# SPDX-License-Identifier: Apache-2.0
"""Which columns plain generation's maps would have, where some layers hand out none."""

from __future__ import annotations

from typing import Any

import torch
from tiny_models import tiny
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import Cache, DynamicLayer

from hf_polyspec.host.callers_cache import added_layers
from hf_polyspec.host.plain_cache import PlainCache


class _State:
    """A layer of a recurrent state, which has no columns."""

    is_compileable = False


def mixed(model: Any) -> Any:
    cache = StaticCache(config=model.config, max_cache_len=20)
    cache.layers.insert(0, _State())
    return cache


def test_maps_are_those_of_the_layers_that_have_columns() -> None:
    """Two maps beside three layers: both are of the fixed size."""
    model = tiny("llama")
    assert len(mixed(model).layers) == 3
    shown = PlainCache(mixed(model), model, [9])
    assert [shown.step(step, place, 2) for step in (0, 1) for place in (0, 1)] == [(20, 0)] * 4
    shown = PlainCache(mixed(model), model, [9])
    assert shown.step(0, 2, 3) == (20, 0)
    assert shown.step(0, 0, 3) is None, "where as many are handed out, the first is the state's"


class _Looping(torch.nn.Module):
    """Makes layers of its own in the cache, like those that are there."""

    def __init__(self, model: Any, added: list[Any]) -> None:
        super().__init__()
        self.model, self.config, self.added = model, model.config, added

    def forward(self, input_ids: torch.Tensor, past_key_values: Cache | None = None, **_: Any) -> None:
        assert past_key_values is not None
        past_key_values.layers += self.added

    def get_input_embeddings(self) -> Any:
        return self.model.get_input_embeddings()


def test_layers_that_a_model_adds_are_of_the_kinds_that_it_adds() -> None:
    window = tiny("mistral", sliding_window=6)
    planned = DynamicCache(config=window.config).layers
    looping = _Looping(window, [*DynamicCache(config=window.config).layers[:1], DynamicLayer()])
    cache = DynamicCache(config=window.config)
    found = added_layers(looping, cache, len(planned) + 2)
    assert [type(layer) for layer in found] == [type(planned[0]), DynamicLayer]
    assert found[0].sliding_window == planned[0].sliding_window
    assert found[0] is not cache.layers[0]
    assert len(cache.layers) == len(planned), "the caller's is as it was"
    assert not added_layers(looping, cache, len(planned))
    assert not added_layers(looping, DynamicCache(), 3), "which makes them itself"
