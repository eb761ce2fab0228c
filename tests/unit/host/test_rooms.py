# SPDX-License-Identifier: Apache-2.0
"""Buffers of all layers as compiled blocks are given them: the same object as long as they are the same."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from transformers.cache_utils import DynamicLayer

from hf_polyspec.host.cache import RollbackCache, RollbackLayer
from hf_polyspec.host.ragged_cache import RaggedCache
from hf_polyspec.host.span import Span
from hf_polyspec.host.spans import spanned

DEPTH, NEW = 3, (1, 2, 1, 4)
LIKE = torch.zeros(1)


def filled(columns: int = 5, depth: int = DEPTH) -> RollbackCache:
    cache = RollbackCache()
    for index in range(depth):
        states = torch.randn(1, 2, columns, 4)
        cache.update(states, -states, index)
    return cache


def test_rooms_stay_while_columns_come_and_go() -> None:
    cache = filled()
    rooms = cache.rooms(DEPTH, NEW, LIKE)
    assert rooms is not None
    assert rooms.start == 5
    for layer, (keys, values, _) in zip(cache.layers, rooms, strict=True):
        keys[:, :, 5], values[:, :, 5] = 7.0, 8.0
        assert layer.get_seq_length() == 5, "what is not claimed does not count"
    assert cache.claim(rooms, 1)
    assert cache.length == 6
    assert all(bool((layer.keys[:, :, 5] == 7).all() and (layer.values[:, :, 5] == 8).all()) for layer in cache.layers)
    cache.shrink(3)
    again = cache.rooms(DEPTH, NEW, LIKE)
    assert again is rooms
    assert again.start == 3


def _wider(cache: RollbackCache) -> None:
    more = torch.zeros(1, 2, 1 + cache.layers[0]._key_buffer.shape[2], 4)
    for index in (1, 0, 2):
        cache.update(more, more, index)


def _rows(cache: RollbackCache) -> None:
    cache.keep_rows([0])


def _values(cache: RollbackCache) -> None:
    cache.layers[2].values = cache.layers[2].values * 2


@pytest.mark.parametrize("change", [_wider, _rows, _values])
def test_other_buffers_are_other_rooms(change: Callable[[RollbackCache], None]) -> None:
    cache = filled()
    before = cache.rooms(DEPTH, NEW, LIKE)
    assert before is not None
    change(cache)
    after = cache.rooms(DEPTH, NEW, LIKE)
    assert after is not before
    if after is not None:
        assert all(keys is layer._key_buffer for layer, (keys, _, _) in zip(cache.layers, after, strict=True))
        assert not cache.claim(before, 1)


def test_columns_that_were_added_meanwhile_are_not_claimed_over() -> None:
    cache = filled()
    rooms = cache.rooms(DEPTH, NEW, LIKE)
    assert rooms is not None
    cache.layers[1].shrink(2)
    assert not cache.claim(rooms, 1)
    assert [layer.get_seq_length() for layer in cache.layers] == [5, 2, 5]
    assert cache.rooms(DEPTH, NEW, LIKE) is None, "layers of different lengths"


@pytest.mark.parametrize(
    ("depth", "new", "like"),
    [
        (DEPTH - 1, NEW, LIKE),
        (DEPTH + 1, NEW, LIKE),
        (DEPTH, (1, 2, 1000, 4), LIKE),
        (DEPTH, (2, 2, 1, 4), LIKE),
        (DEPTH, (1, 2, 1, 8), LIKE),
        (DEPTH, NEW, LIKE.double()),
    ],
)
def test_what_does_not_fit_has_no_rooms(depth: int, new: tuple[int, int, int, int], like: torch.Tensor) -> None:
    assert filled().rooms(depth, new, like) is None


def test_a_cache_that_never_held_anything_is_given_its_buffers() -> None:
    cache = RollbackCache()
    cache.open(DEPTH, (1, 2, 7, 4), LIKE.bfloat16())
    assert cache.length == 0
    assert cache.get_seq_length() == 0
    rooms = cache.rooms(DEPTH, (1, 2, 7, 4), LIKE.bfloat16())
    assert rooms is not None
    for index, (keys, values, _) in enumerate(rooms):
        keys[:, :, :7], values[:, :, :7] = index, -index
    assert cache.claim(rooms, 7)
    found = cache.update(torch.full(NEW, 9.0).bfloat16(), torch.full(NEW, -9.0).bfloat16(), 1)
    assert [states[0, 0, :, 0].tolist() for states in found] == [[1.0] * 7 + [9.0], [-1.0] * 7 + [-9.0]]
    for index, layer in enumerate(cache.layers):
        assert bool((layer.keys[:, :, :7] == index).all()), "no buffer reaches into another's"
        assert bool((layer.values[:, :, :7] == -index).all())


def _one_more(cache: RollbackCache) -> None:
    cache.update(torch.ones(NEW), torch.ones(NEW), 0)


def _emptied(cache: RollbackCache) -> None:
    _one_more(cache)
    cache.shrink(0)


def _deeper(cache: RollbackCache) -> None:
    cache.layers = [RollbackLayer() for _ in range(DEPTH + 1)]


def _another_kind(cache: RollbackCache) -> None:
    cache.layers = [DynamicLayer()]


@pytest.mark.parametrize("before", [_one_more, _emptied, _deeper, _another_kind])
def test_any_other_cache_stays_as_it_is(before: Callable[[RollbackCache], None]) -> None:
    cache = RollbackCache()
    before(cache)
    layers = list(cache.layers)
    held = [layer.keys for layer in layers]
    cache.open(DEPTH, NEW, LIKE)
    assert all(one is other for one, other in zip(cache.layers, layers, strict=True))
    assert all(
        one is None if was is None else torch.equal(one, was)
        for one, was in zip((layer.keys for layer in layers), held, strict=True)
    )


def test_layers_set_apart_have_no_rooms() -> None:
    cache = filled()
    cache.apart = {1: 5}
    assert cache.rooms(DEPTH, NEW, LIKE) is None


class _Model(torch.nn.Module):
    """Has no config that a cache could be made by."""


def test_rows_apart_share_their_rooms() -> None:
    cache = RaggedCache(2, _Model())
    cache.reserve(0, 0, 5)
    cache.reserve(1, 0, 9)
    model = _Model()
    model.config = type("Config", (), {"get_text_config": lambda self, **_: self})()

    def rooms(count: int = DEPTH) -> object:
        with spanned(model, {None: [Span(0, 1, 0, 4)]}):
            return cache.rooms(count, NEW, LIKE)

    assert rooms() is None, "nothing was read yet"
    with spanned(model, {None: [Span(0, 1, 0, 4)]}):
        for index in range(DEPTH):
            cache.update(torch.ones(NEW), torch.ones(NEW), index)
    found = rooms()
    assert found is not None
    assert rooms() is found
    assert rooms(DEPTH + 1) is None
    cache.reserve(1, 0, 500)
    assert rooms() is None, "buffers are narrower than the regions"
    cache.fit()
    wider = rooms()
    assert wider is not None
    assert wider is not found
    assert all(keys is layer.keys for layer, (keys, _, _) in zip(cache.layers, wider, strict=True))
