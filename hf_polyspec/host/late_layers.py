# SPDX-License-Identifier: Apache-2.0
"""Layers of a cache that are made when somebody looks at them.

generate() puts a cache into every output object, and hardly anybody goes on from it. What it lacks of rows that ended
early takes a pass of the model, and all of it a copy; both are left until its layers are looked at.
"""

from __future__ import annotations

import copy
import threading
import weakref
from collections.abc import Callable, Iterator, MutableSequence
from typing import Any

import torch
from transformers.cache_utils import Cache, DynamicCache


def may_be_late(cache: Any) -> bool:
    """Whether a cache is of the class whose layers are all that it has, as generate() makes it for most models."""
    return type(cache) is DynamicCache and not getattr(cache, "offloading", False)


def fill_late(cache: Cache, fill: Callable[[Cache], None]) -> None:
    """Have a cache filled when its layers are first looked at, in whatever way, from whatever thread.

    Args:
        cache: see `may_be_late`; it is changed once it is filled.
        fill: is given a cache of the same layers, and fills it, in the mode of gradients that is on now. What it raises
            goes to whoever looks, and the next look tries again.
    """
    cache.layers = LateLayers(cache, fill)


class LateLayers(MutableSequence[Any]):
    """Stands for the list of a cache's layers until that is filled, and then for the filled one."""

    def __init__(self, cache: Cache, fill: Callable[[Cache], None]) -> None:
        self._layers: list[Any] = cache.layers
        self._beside = copy.copy(cache)
        # No circle: keys and values go as soon as the last of the cache and these layers does.
        self._cache = weakref.ref(cache)
        self._fill: Callable[[Cache], None] | None = fill
        self._inference = torch.is_inference_mode_enabled()
        self._lock = threading.RLock()

    def _filled(self) -> list[Any]:
        with self._lock:
            if self._fill is not None:
                with torch.inference_mode(self._inference), torch.no_grad():
                    self._fill(self._beside)
                self._fill = None
                cache = self._cache()
                if cache is not None and cache.layers is self:
                    vars(cache).update(vars(self._beside))
        return self._layers

    def __len__(self) -> int:
        return len(self._filled())

    def __getitem__(self, place: Any) -> Any:
        return self._filled()[place]

    def __setitem__(self, place: Any, layer: Any) -> None:
        self._filled()[place] = layer

    def __delitem__(self, place: Any) -> None:
        del self._filled()[place]

    def __iter__(self) -> Iterator[Any]:
        return iter(self._filled())

    def __add__(self, other: Any) -> list[Any]:
        return self._filled() + list(other)

    def __radd__(self, other: Any) -> list[Any]:
        return list(other) + self._filled()

    def __eq__(self, other: object) -> bool:
        return self._filled() == other

    __hash__ = None  # type: ignore[assignment]

    def insert(self, index: int, value: Any) -> None:
        self._filled().insert(index, value)

    def copy(self) -> list[Any]:
        """A list of the layers."""
        return list(self._filled())

    def __deepcopy__(self, memo: dict[int, Any]) -> list[Any]:
        return copy.deepcopy(self._filled(), memo)

    def __reduce__(self) -> tuple[Any, ...]:
        return list, (list(self._filled()),)

    def __repr__(self) -> str:
        return repr(self._filled())
