# SPDX-License-Identifier: Apache-2.0
"""Keys and values of rows that each have a region of their own.

All regions lie side by side in one buffer a layer, at the same places in every layer. How many columns of its region a
row fills is known to whoever reads the ids (law 4), so that rolling back a row is forgetting a number.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers.cache_utils import DynamicCache, DynamicLayer

from .cache import RollbackCache
from .spans import pass_under_way

_MORE_ROOM = 64
ALIGNED = 16
"""Regions begin and end at multiples of so many columns."""


class Regions:
    """Where each row's columns are.

    Attributes:
        bases: first column of each row's region; rooms: columns of it.
        capacity: columns of all regions, and of what is between them.
    """

    def __init__(self, rows: int) -> None:
        self.bases = [0] * rows
        self.rooms = [0] * rows
        self.capacity = 0

    def reserve(self, row: int, columns: int) -> int:
        """Make room for so many columns of a row, elsewhere if its region is too small.

        Returns:
            Where its region was before.
        """
        before = self.bases[row]
        if columns <= self.rooms[row]:
            return before
        room = columns + max(_MORE_ROOM, columns // 2)
        room = (room + ALIGNED - 1) // ALIGNED * ALIGNED
        taken = sorted((base, base + size) for base, size in zip(self.bases, self.rooms, strict=True) if size)
        start = 0
        for base, end in taken:  # the first gap that is large enough, or behind all of them
            if base - start >= room:
                break
            start = end
        self.bases[row], self.rooms[row] = start, room
        if start + room > self.capacity:
            self.capacity = max(start + room, self.capacity + self.capacity // 2) // ALIGNED * ALIGNED
        return before

    def keep(self, rows: Sequence[int]) -> None:
        """Only these rows' regions stay; each row once."""
        self.bases = [self.bases[row] for row in rows]
        self.rooms = [self.rooms[row] for row in rows]

    def add(self, count: int) -> None:
        """So many more rows, which hold nothing."""
        self.bases += [0] * count
        self.rooms += [0] * count


class RaggedLayer(DynamicLayer):
    """Keys and values `[1, H, capacity, D]` of all rows."""

    def __init__(self, regions: Regions) -> None:
        super().__init__()
        self.regions = regions
        self.keys: Any = None
        self.values: Any = None
        self._reserved: tuple[Any, Any] | None = None

    def get_seq_length(self) -> int:
        return 0  # of no use to anybody: rows have different ones, and positions are given

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store the columns of the pass under way, and return the buffers with the regions of all rows.

        Raises:
            ValueError: outside of a pass over rows of their own, or with other columns than its own.
        """
        under_way = pass_under_way()
        if under_way is None or key_states.shape[2] != under_way.columns or key_states.shape[0] != 1:
            raise ValueError("keys and values of other columns than those of the pass")
        self.fit(key_states, value_states)
        written = under_way.written(key_states.device)
        self.keys.index_copy_(2, written, key_states)
        self.values.index_copy_(2, written, value_states)
        return self.keys, self.values

    def fit(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Give the buffers the columns of all regions, for keys and values `[1, H, N, D]` like these."""
        if not self.is_initialized:
            self.lazy_initialization(keys, values)
            self.keys = self.values = None
        capacity = self.regions.capacity
        if self.keys is None or self.keys.shape[2] < capacity:
            self.keys, self.values = _wider(self.keys, keys, capacity), _wider(self.values, values, capacity)

    def holds(self, shape: tuple[int, int, int, int], like: torch.Tensor) -> bool:
        """Whether there are buffers for the pass under way, of new keys and values of a shape `(1, H, N, D)`."""
        under_way, keys, values = pass_under_way(), self.keys, self.values
        if under_way is None or keys is None or shape[0] != 1 or shape[2] != under_way.columns:
            return False
        wanted = (1, shape[1], self.regions.capacity, shape[3])
        return keys.shape == values.shape == wanted and keys.dtype is values.dtype is like.dtype

    def reserve(self, shape: tuple[int, int, int, int], like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, int]:
        """The buffers, for whoever writes the pass's columns to their places himself, and says so (`claim`)."""
        self._reserved = pass_under_way(), self.keys
        return self.keys, self.values, 0

    def claim(self, fed: int) -> bool:
        """The columns of the pass were written; False if it is another one, or there are other buffers by now."""
        reserved, self._reserved = self._reserved, None
        return reserved is not None and reserved[0] is pass_under_way() and reserved[1] is self.keys

    def move(self, source: int, target: int, count: int) -> None:
        """Columns to another place, which does not overlap with theirs."""
        if self.keys is not None:
            self.fit(self.keys, self.values)
            for states in (self.keys, self.values):
                states[:, :, target : target + count] = states[:, :, source : source + count]

    def pick(self, sources: torch.Tensor, targets: torch.Tensor) -> None:
        """Column `sources[i]` becomes column `targets[i]`, all at once."""
        if self.keys is not None:
            for states in (self.keys, self.values):
                index = sources.to(states.device)
                states.index_copy_(2, targets.to(states.device), states.index_select(2, index))


def _wider(states: torch.Tensor | None, like: torch.Tensor, capacity: int) -> torch.Tensor:
    # Zeros, since some models compute with the columns between regions too, and what that gives must be a number.
    wider = like.new_zeros(1, like.shape[1], capacity, like.shape[3])
    if states is not None:
        wider[:, :, : states.shape[2]] = states
    return wider


class RaggedCache(DynamicCache):
    """A cache of `RaggedLayer`s, added as the model asks for them.

    Attributes:
        regions: where rows are, in every layer.
    """

    def __init__(self, rows: int) -> None:
        super().__init__()
        self.regions = Regions(rows)
        self.layer_class_to_replicate: Any = lambda *_args, **_kwargs: RaggedLayer(self.regions)

    def extend(
        self, index: int, shape: tuple[int, int, int, int], like: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, int]:
        """A layer's buffers, for whoever writes the pass's columns to their places at once."""
        layer = self.ragged_layers[index]
        return layer.keys, layer.values, 0

    def fit(self) -> None:
        """Give every layer that holds something the columns of all regions."""
        for layer in self.ragged_layers:
            if layer.keys is not None:
                layer.fit(layer.keys, layer.values)

    @property
    def ragged_layers(self) -> list[Any]:
        """The layers that hold keys and values."""
        found: list[Any] = self.layers
        return found

    def reserve(self, row: int, held: int, columns: int) -> None:
        """Make room for so many columns of a row, the first `held` of which stay what they are."""
        before = self.regions.reserve(row, columns)
        if held and self.regions.bases[row] != before:
            for layer in self.ragged_layers:
                layer.move(before, self.regions.bases[row], held)

    def copy(self, source: int, target: int, first: int, end: int) -> None:
        """Columns `first` to `end`, exclusive, of one row's region to the same ones of another's, which has room."""
        bases = self.regions.bases
        for layer in self.ragged_layers:
            layer.move(bases[source] + first, bases[target] + first, end - first)

    def copy_from(self, other: RaggedCache, row: int, first: int, end: int) -> None:
        """Columns `first` to `end`, exclusive, of the same row in another model's cache."""
        here, there = self.regions.bases[row], other.regions.bases[row]
        for index, layer in enumerate(other.ragged_layers):
            if layer.keys is None:
                continue
            while len(self.layers) <= index:
                self.layers.append(RaggedLayer(self.regions))
            own = self.ragged_layers[index]
            own.fit(layer.keys, layer.values)
            for states, lent in ((own.keys, layer.keys), (own.values, layer.values)):
                states[:, :, here + first : here + end] = lent[:, :, there + first : there + end]

    def pick(self, sources: list[int], targets: list[int]) -> None:
        """Columns of the buffers to other ones, all at once."""
        moves = [(one, other) for one, other in zip(sources, targets, strict=True) if one != other]
        if moves:
            from_, to = torch.tensor(moves).T
            for layer in self.ragged_layers:
                layer.pick(from_, to)

    def rectangle(self, lengths: Sequence[int]) -> RollbackCache:
        """A copy with all rows ending at one edge, as the models' own caches have them; zeros where a row has nothing.

        Args:
            lengths: columns that each row fills.
        """
        made, width = RollbackCache(), max(lengths)
        for index, layer in enumerate(self.ragged_layers):
            if layer.keys is None:
                continue
            pair = []
            for states in (layer.keys, layer.values):
                whole = states.new_zeros(len(lengths), states.shape[1], width, states.shape[3])
                for row, (base, length) in enumerate(zip(self.regions.bases, lengths, strict=True)):
                    whole[row, :, width - length :] = states[0, :, base : base + length]
                pair.append(whole)
            made.update(*pair, index)
        return made
