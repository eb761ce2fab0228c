# SPDX-License-Identifier: Apache-2.0
"""Layers of sparse attention: beside keys and values they keep, token by token, keys by which an indexer chooses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import cache_utils

from .cache import READABLE_LAYERS, RollbackLayer

# Releases before 5.17 had no such layers.
_IndexedLayer: Any = getattr(cache_utils, "DynamicIndexedLayer", None)
INDEXED_LAYERS: tuple[Any, ...] = () if _IndexedLayer is None else (_IndexedLayer,)
CROPPED_LAYERS = (*READABLE_LAYERS, *INDEXED_LAYERS)
"""Layers that hold something token by token, which can be cut."""
_BESIDE = {"indexer_keys": 1, "indexer_position_ids": 2}
"""What such a layer holds besides keys and values, and the dimension of each that counts columns; the one before it
counts rows."""


class RollbackIndexedLayer(RollbackLayer, *INDEXED_LAYERS):  # type: ignore[misc]
    """A `RollbackLayer` whose indexer's keys `[B, S, D]` and positions `[N, B, S]` follow its columns."""

    def _each(self) -> list[tuple[str, torch.Tensor, int]]:
        held = [(name, getattr(self, name, None), dimension) for name, dimension in _BESIDE.items()]
        return [(name, one, dimension) for name, one, dimension in held if one is not None and one.numel()]

    def shrink(self, length: int) -> None:
        super().shrink(length)
        for name, tensor, dimension in self._each():
            setattr(self, name, tensor.narrow(dimension, 0, min(length, tensor.shape[dimension])))

    def crop(self, tokens_to_remove: int) -> None:
        RollbackLayer.crop(self, tokens_to_remove)

    def gather(self, columns: torch.Tensor, start: int = 0) -> None:
        super().gather(columns, start)
        for name, tensor, dimension in self._each():
            setattr(self, name, _picked(tensor, columns, start, dimension))

    def shift(self, moves: Sequence[tuple[int, int, int]], length: int) -> None:
        super().shift(moves, length)
        for name, tensor, dimension in self._each():
            # Columns that nothing is moved to are seen by nobody.
            moved = tensor.new_zeros(*tensor.shape[:dimension], length, *tensor.shape[dimension + 1 :])
            for row, (source, destination, count) in enumerate(moves):
                into = moved.select(dimension - 1, row).narrow(dimension - 1, destination, count)
                into.copy_(tensor.select(dimension - 1, row).narrow(dimension - 1, source, count))
            setattr(self, name, moved)

    def keep_rows(self, rows: torch.Tensor) -> None:
        super().keep_rows(rows)
        for name, tensor, dimension in self._each():
            setattr(self, name, tensor.index_select(dimension - 1, rows.to(tensor.device)))


def _picked(tensor: torch.Tensor, columns: torch.Tensor, start: int, dimension: int) -> torch.Tensor:
    """The first `start` columns, and then those at `columns[b]` `[B, S']` of row b."""
    shape = [1] * tensor.ndim
    shape[dimension - 1], shape[dimension] = columns.shape
    sizes = list(tensor.shape)
    sizes[dimension] = columns.shape[1]
    index = columns.to(tensor.device).view(shape).expand(sizes)
    return torch.cat([tensor.narrow(dimension, 0, start), tensor.gather(dimension, index)], dim=dimension)


def extend_beside(layer: Any, source: Any, start: int) -> None:
    """What a pass over columns `start` onwards would leave in a layer besides keys and values.

    Args:
        layer: of any cache; source: one that holds all columns.
    """
    if type(layer) in INDEXED_LAYERS:
        vars(layer).update(copied(source))
    elif hasattr(layer, "update_indexer") and (keys := getattr(source, "indexer_keys", None)) is not None:
        layer.update_indexer(keys[:, start:])  # of a fixed size
        places = getattr(source, "indexer_position_ids", None)
        if places is not None:
            layer.indexer_position_ids = places.clone()


def copied(layer: Any) -> dict[str, Any]:
    """What an indexed layer holds besides keys and values, in tensors of its own."""
    return {
        name: value.clone() if isinstance(value, torch.Tensor) else value
        for name, value in vars(layer).items()
        if "indexer" in name
    }
