# SPDX-License-Identifier: Apache-2.0
"""transformers' own growing cache, written in place.

Its layers hold tensors that every pass replaces by longer ones. Here they are given views of larger buffers, behind
which compiled blocks write. Only columns that nothing has shown yet are written: whoever kept what a layer held keeps
it as it was. Whoever puts other tensors in their place (cropping, beams, selected rows) is noticed, and the next pass
begins a new buffer with what stands there.
"""

from __future__ import annotations

from functools import cache
from typing import Any
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer

from .cache import RollbackCache, RollbackLayer
from .ragged_cache import RaggedCache, RaggedLayer

Shape = tuple[int, int, int, int]
Room = tuple[Tensor, Tensor, int]
Past = DynamicCache | RaggedCache

_FIRST_CAPACITY = 64
# As transformers has them, before anybody replaces them.
_UPDATES = DynamicCache.update, DynamicLayer.update


class GrowingLayer:
    """A layer of transformers' with room behind its keys and values; offers what a `RollbackLayer` does.

    Args:
        layer: Holds keys and values `[B, H, S, D]`.
    """

    def __init__(self, layer: Any) -> None:
        self._layer = ref(layer)
        self._room: tuple[Tensor, Tensor] | None = None
        self._shown: tuple[Tensor, Tensor] | None = None
        self._start: int | None = None

    def get_seq_length(self) -> int:
        """Columns held."""
        return int(self._held()[0].shape[2])

    def holds(self, shape: Shape, like: Tensor) -> bool:
        """Whether keys and values of a shape `(B, H, F, D)` and like a tensor go behind those that are held."""
        keys, values = self._held()
        return keys.shape == values.shape and all(
            type(held) is Tensor
            and held.dtype is like.dtype
            and held.device == like.device
            and (*held.shape[:2], held.shape[3]) == (*shape[:2], shape[3])
            for held in (keys, values)
        )

    def reserve(self, shape: Shape, like: Tensor) -> Room:
        """Room for new columns, which count only once they are claimed.

        Args:
            shape: Of the new keys and of the new values, `(B, H, F, D)`.
            like: Has their dtype and device.

        Returns:
            The buffers `[B, H, capacity, D]`, contiguous, and the column from which to write.
        """
        keys, values = self._held()
        start = int(keys.shape[2])
        room = self._room
        if room is None or not self._is_shown(keys, values) or start + shape[2] > room[0].shape[2]:
            room = self._room = _larger(keys, start + shape[2], like), _larger(values, start + shape[2], like)
            self._show(start)
        self._start = start
        return (*room, start)

    def claim(self, fed: int) -> bool:
        """Count `fed` columns that were reserved last; False if the layer has changed since."""
        start, self._start = self._start, None
        if start is None or not self._is_shown(*self._held()):
            return False
        self._show(start + fed)
        return True

    def extend(self, shape: Shape, like: Tensor) -> Room:
        """Room for new columns, which count at once."""
        room = self.reserve(shape, like)
        self.claim(shape[2])
        return room

    def _held(self) -> tuple[Any, Any]:
        layer: Any = self._layer()
        return layer.keys, layer.values

    def _is_shown(self, keys: Tensor, values: Tensor) -> bool:
        shown = self._shown
        return shown is not None and keys is shown[0] and values is shown[1]

    def _show(self, length: int) -> None:
        assert self._room is not None
        layer: Any = self._layer()
        keys, values = self._room
        layer.keys, layer.values = self._shown = keys.narrow(2, 0, length), values.narrow(2, 0, length)


def _larger(held: Tensor, columns: int, like: Tensor) -> Tensor:
    """A buffer that begins with what is held and has room for so many columns and half as many again."""
    batch, heads, length, size = held.shape
    buffer = like.new_empty(batch, heads, max(_FIRST_CAPACITY, columns + columns // 2), size)
    buffer[:, :, :length] = held
    return buffer


# By layer, and not in it: a copy of a layer must not believe that the room behind its tensors is its own.
_LAYERS: WeakKeyDictionary[Any, GrowingLayer] = WeakKeyDictionary()


def growing_layer(past: Any, index: int) -> RollbackLayer | RaggedLayer | GrowingLayer | None:
    """A layer of a cache as compiled blocks write it, None if they cannot.

    Args:
        past: A cache for which `grows` holds; index: of the layer, which the cache may not have yet.
    """
    if index >= len(past.layers):
        return None
    layer = past.layers[index]
    if type(layer) in (RollbackLayer, RaggedLayer):
        return layer  # type: ignore[no-any-return]
    # transformers begins with a tensor of no shape, or none.
    if type(layer) is not DynamicLayer or "update" in layer.__dict__ or getattr(layer.keys, "ndim", 0) != 4:
        return None
    found = _LAYERS.get(layer)
    if found is None:
        found = _LAYERS[layer] = GrowingLayer(layer)
    return found


def grows(past: Any) -> bool:
    """Whether a cache is one of ours, or one of transformers' whose layers do nothing but grow.

    A cache that moves its layers elsewhere, or whose class or instance somebody has taught something else, is none.
    """
    if type(past) in (RollbackCache, RaggedCache):
        return True
    return (
        type(past) is DynamicCache
        and not getattr(past, "offloading", False)
        and "update" not in past.__dict__
        and (DynamicCache.update, DynamicLayer.update) == _UPDATES
        and _tried()
    )


@cache
def _tried() -> bool:
    """Whether transformers' layers are what is assumed: their length is that of the tensors that anybody puts there."""
    try:
        with torch.no_grad():
            new = torch.arange(6.0).view(1, 1, 3, 2)
            past, wanted = DynamicCache(), torch.cat([new, new[:, :, :1], new[:, :, 1:]], 2)
            past.update(new, -new, 0)
            (layer,) = past.layers
            own = GrowingLayer(layer)
            keys, values, start = own.reserve((1, 1, 1, 2), new)
            keys[:, :, start], values[:, :, start] = new[:, :, 0], -new[:, :, 0]
            kept = own.claim(1) and layer.get_seq_length() == past.get_seq_length() == 4
            found = past.update(new[:, :, 1:], -new[:, :, 1:], 0)
            same = all(torch.equal(one, sign * wanted) for one, sign in zip(found, (1, -1), strict=True))
            return type(layer) is DynamicLayer and kept and same and layer.keys is found[0] and layer.values is found[1]
    except Exception:
        # A release whose layers are otherwise may fail in any way; its caches are left to it.
        return False
