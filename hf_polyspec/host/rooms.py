# SPDX-License-Identifier: Apache-2.0
"""Where compiled blocks write the keys and values of all layers at once, kept from pass to pass."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch


class Rooms(list[tuple[torch.Tensor, torch.Tensor, int]]):
    """The buffers of keys and of values of layers, `[B, H, capacity, D]`; nobody but their cache replaces one.

    Args:
        pairs: of each layer, all of one shape and dtype.

    Attributes:
        start: the column from which the pass under way writes, in every layer.
        seen: the moment in which they were last found to be the cache's own.
        pairs: all keys, and all values.
    """

    def __init__(self, pairs: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> None:
        super().__init__((keys, values, 0) for keys, values in pairs)
        self.start = 0
        self.seen: object = None
        self.pairs = [keys for keys, _, _ in self], [values for _, values, _ in self]

    def take(self, shape: tuple[int, int, int, int], like: torch.Tensor) -> bool:
        """Whether new keys and values `(B, H, F, D)` like a tensor fit in from `start` on."""
        keys = self[0][0]
        batch, heads, capacity, size = keys.shape
        fits = (batch, heads, size) == (shape[0], shape[1], shape[3]) and self.start + shape[2] <= capacity
        return fits and keys.dtype is like.dtype and keys.device == like.device


def rooms_of(pairs: Sequence[tuple[torch.Tensor | None, torch.Tensor | None]]) -> Rooms | None:
    """The buffers of layers; None where not all have some, or they are not alike."""
    found = [(keys, values) for keys, values in pairs if keys is not None and values is not None]
    kinds = {(one.shape, one.dtype, one.device) for pair in found for one in pair}
    return Rooms(found) if len(kinds) == 1 and len(found) == len(pairs) else None
