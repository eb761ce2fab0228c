# SPDX-License-Identifier: Apache-2.0
"""Packed blocks on the cache that generate() itself makes: one task a pass, the same numbers, the same cache."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer, StaticCache

from hf_polyspec.cpu.compiled import compiles

if not compiles():
    pytest.skip("compiled functions do not run here", allow_module_level=True)

from stacked_blocks import DEPTH, IDS, Tiny, packed_model, run

from hf_polyspec.cpu import fused_block
from hf_polyspec.host import growing
from hf_polyspec.host.cache import RollbackCache
from hf_polyspec.host.growing import GrowingLayer, grows
from hf_polyspec.host.ragged_cache import RaggedCache
from hf_polyspec.host.release import GENERATION_CACHE

PLACES = [(0, 40), (40, 41), (41, 42), (42, 43), (43, 49), (49, 50), (50, 90), (90, 91), (91, 92)]


@pytest.fixture
def as_before(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], Any]], Any]:
    """Calls something with blocks that write into no cache but ours."""

    def call(function: Callable[[], Any]) -> Any:
        with monkeypatch.context() as patched:
            patched.setattr(fused_block, "grows", lambda past: type(past) in (RollbackCache, RaggedCache))
            return function()

    return call


def _generated(model: Any, rows: int = 1, **given: Any) -> tuple[Tensor, Any]:
    ids = IDS[:rows, :12].clone()
    mask = torch.ones_like(ids)
    if rows > 1:
        mask[1, :5] = 0
    settings = {"max_new_tokens": 20, "min_new_tokens": 20, "do_sample": False, "pad_token_id": 0, **given}
    out = model.generate(ids, attention_mask=mask, return_dict_in_generate=True, **settings)
    return out.sequences, out[GENERATION_CACHE]


def _same_cache(found: Any, wanted: Any) -> None:
    assert type(found) is type(wanted)
    assert len(found.layers) == len(wanted.layers)
    assert found.get_seq_length() == wanted.get_seq_length()
    for one, other in zip(found.layers, wanted.layers, strict=True):
        assert type(one) is type(other)
        assert torch.equal(one.keys, other.keys)
        assert torch.equal(one.values, other.values)


@pytest.mark.parametrize("form", ["float32", "bfloat16", "int8", "int8 bfloat16"])
@pytest.mark.parametrize("rows", [1, 3])
def test_plain_generate(tiny: Tiny, form: str, rows: int, tasks: list[int], as_before: Callable[..., Any]) -> None:
    model = packed_model(tiny, form)
    sequences, cache = as_before(lambda: _generated(model, rows))
    assert tasks == []
    found, kept = _generated(model, rows)
    assert torch.equal(found, sequences)
    _same_cache(kept, cache)
    # The first pass makes the cache, in the second the blocks meet.
    assert tasks == [1] * DEPTH + [DEPTH] * 18


def test_columns_are_written_once_and_room_is_not_made_in_every_pass(tiny: Tiny) -> None:
    model, cache = packed_model(tiny), DynamicCache()
    buffers = set()
    for start, end in [(0, 40), *((at, at + 1) for at in range(40, 100))]:
        run(model, IDS[:1, start:end], cache)
        buffers.add(cache.layers[2].keys.untyped_storage().data_ptr())
    assert len(buffers) <= 4


def _crop(cache: Any) -> Any:
    cache.crop(-2)
    return cache


def _reorder(cache: Any) -> Any:
    cache.reorder_cache(torch.tensor([2, 0, 0]))
    return cache


def _select(cache: Any) -> Any:
    cache.batch_select_indices(torch.tensor([1, 2, 0]))
    return cache


def _repeat(cache: Any) -> Any:
    cache.batch_select_indices(torch.tensor([1]))
    cache.batch_repeat_interleave(3)
    return cache


def _write(cache: Any) -> Any:
    with torch.no_grad():
        cache.layers[1].keys[:, :, 3] = 0.5
        cache.layers[3].values.mul_(0.5)
    return cache


def _update_one(cache: Any) -> Any:
    """Columns that are put in and taken out again behind our back."""
    for layer in cache.layers:
        layer.update(torch.ones_like(layer.keys[:, :, :1]), torch.ones_like(layer.values[:, :, :1]))
    cache.crop(-1)
    return cache


def _copy_layers(cache: Any) -> Any:
    """Copies that share tensors with layers that go on being used, and are used themselves."""
    other = copy.copy(cache)
    other.layers = [copy.copy(layer) for layer in cache.layers]
    _go_on.append(cache)
    return other


_go_on: list[Any] = []
CHANGES = [_crop, _reorder, _select, _repeat, _write, _update_one, _copy_layers, copy.deepcopy]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_whatever_is_done_to_a_cache_between_passes(
    tiny: Tiny, change: Callable[[Any], Any], tasks: list[int], as_before: Callable[..., Any]
) -> None:
    model = packed_model(tiny)

    def passes() -> tuple[list[Tensor], Any]:
        _go_on.clear()
        cache, logits = DynamicCache(), []
        for turn, (start, end) in enumerate(PLACES):
            if turn in (4, 5, 8):
                cache = change(cache)
            logits.append(run(model, IDS[:3, start:end], cache))
            for other in _go_on:
                logits.append(run(model, IDS[:3, start + 9 : end + 9], other))
        return logits, cache

    wanted, cache = as_before(passes)
    assert tasks == []
    found, kept = passes()
    assert all(map(torch.equal, found, wanted))
    _same_cache(kept, cache)
    assert DEPTH in tasks[-3:]


def test_who_kept_what_a_layer_held_keeps_it(tiny: Tiny) -> None:
    model, cache, kept = packed_model(tiny), DynamicCache(), []
    for turn, (start, end) in enumerate(PLACES):
        if turn in (4, 7):
            cache.crop(-1)
        run(model, IDS[:1, start:end], cache)
        held = [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]
        kept.extend((tensor, tensor.clone()) for tensor in held)
    assert all(torch.equal(tensor, before) for tensor, before in kept)


@pytest.mark.parametrize("given", [{"num_beams": 3}, {"prompt_lookup_num_tokens": 4}, {"num_return_sequences": 2}])
def test_other_ways_to_generate(tiny: Tiny, given: dict[str, Any], as_before: Callable[..., Any]) -> None:
    if "num_return_sequences" in given:
        given = {**given, "do_sample": True}
    model = packed_model(tiny)

    def call() -> Tensor:
        torch.manual_seed(4)
        return _generated(model, **given)[0]

    assert torch.equal(call(), as_before(call))


class _Own(DynamicCache):
    pass


def _taught(cache: Any) -> Any:
    plain = cache.update
    cache.update = lambda *given, **named: plain(*given, **named)
    return cache


def _offloading(cache: Any) -> Any:
    cache.offloading, cache.only_non_sliding = True, False
    return cache


def test_other_caches_are_left_to_their_classes(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    config = packed_model(tiny).config
    for cache in (_Own(), StaticCache(config, 60), _taught(DynamicCache()), _offloading(DynamicCache())):
        assert not grows(cache)
    assert grows(DynamicCache())
    assert grows(RollbackCache())
    plain = DynamicLayer.update
    with monkeypatch.context() as patched:
        patched.setattr(DynamicLayer, "update", lambda *given, **named: plain(*given, **named))
        assert not grows(DynamicCache())
    monkeypatch.setattr(growing, "_tried", lambda: False)
    assert not grows(DynamicCache())


def test_a_release_whose_length_is_elsewhere_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DynamicLayer, "get_seq_length", lambda layer: 3)
    assert not growing._tried.__wrapped__()


def test_windows_are_left_to_their_layers(tiny: Tiny, tasks: list[int], as_before: Callable[..., Any]) -> None:
    model = packed_model(tiny, family="mistral")
    model.config.sliding_window = 16

    def passes() -> tuple[list[Tensor], Any]:
        cache = DynamicCache(config=model.config)
        return [run(model, IDS[:1, start:end], cache) for start, end in PLACES], cache

    wanted, cache = as_before(passes)
    found, kept = passes()
    assert tasks == []
    assert all(map(torch.equal, found, wanted))
    _same_cache(kept, cache)


def test_what_was_reserved_counts_only_where_nothing_changed() -> None:
    states = torch.rand(2, 1, 4, 3)
    cache = DynamicCache()
    cache.update(states, -states, 0)
    (layer,) = cache.layers
    own = GrowingLayer(layer)
    assert not own.claim(1), "nothing is reserved"
    own.reserve((2, 1, 1, 3), states)
    cache.crop(-1)
    assert not own.claim(1)
    assert cache.get_seq_length() == 3
    assert own.reserve((2, 1, 2, 3), states)[2] == 3
    assert own.claim(2)
    assert cache.get_seq_length() == own.get_seq_length() == 5
    assert torch.equal(layer.values[:, :, :3], -states[:, :, :3])
    assert not own.holds((2, 2, 1, 3), states)
    assert not own.holds((2, 1, 1, 3), states.double())
