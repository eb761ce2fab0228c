# SPDX-License-Identifier: Apache-2.0
"""Key-value caches that can be rolled back, row by row.

Every level owns a `RollbackCache`: full-attention layers in a buffer that grows by doubling, so that neither adding
nor dropping tokens copies what is already there. Models with sliding windows get full layers too; their masks still
apply the window, which keeps rows of different lengths exact (a window is measured in columns, and rows are kept
aligned to the right). Caches the caller handed in are copied into one of these (see `callers_cache`).
"""

from __future__ import annotations

from collections.abc import Sequence
from ctypes import memmove
from itertools import chain
from operator import attrgetter, is_
from typing import Any

import torch
from transformers import cache_utils
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from ..errors import RollbackError
from .buffers import alike, buffers, whole, with_room
from .rooms import Rooms, rooms_of

_KEYS, _VALUES, _LENGTH = attrgetter("_key_buffer"), attrgetter("_value_buffer"), attrgetter("_length")


class RollbackLayer(DynamicLayer):
    """Keys and values `[B, H, S, D]` as views of a larger buffer; shrinking is a change of length."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._key_buffer: torch.Tensor | None = None
        self._value_buffer: torch.Tensor | None = None
        self._length = 0
        self._reserved: tuple[torch.Tensor, torch.Tensor, int] | None = None
        super().__init__()

    # Views are made when somebody looks: compiled blocks write into the buffers, and a pass has dozens of layers.
    @property
    def keys(self) -> torch.Tensor | None:
        """What the cache holds, None before the first pass."""
        return None if self._key_buffer is None else self._key_buffer[:, :, : self._length]

    @keys.setter
    def keys(self, states: torch.Tensor | None) -> None:
        self._key_buffer = whole(states)
        self._length = 0 if self._key_buffer is None else self._key_buffer.shape[2]

    @property
    def values(self) -> torch.Tensor | None:
        """As many as keys."""
        return None if self._value_buffer is None else self._value_buffer[:, :, : self._length]

    @values.setter
    def values(self, states: torch.Tensor | None) -> None:
        self._value_buffer = whole(states)

    def get_seq_length(self) -> int:
        return self._length

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        # Without the tensors of no shape that transformers begins with.
        self.dtype, self.device, self.is_initialized = key_states.dtype, key_states.device, True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start = self.get_seq_length()
        end = start + key_states.shape[-2]
        self._key_buffer = with_room(self._key_buffer, key_states.shape, key_states, start)
        self._value_buffer = with_room(self._value_buffer, value_states.shape, value_states, start)
        self._key_buffer[:, :, start:end] = key_states
        self._value_buffer[:, :, start:end] = value_states
        self._length = end
        return self._key_buffer[:, :, :end], self._value_buffer[:, :, :end]

    def extend(self, shape: tuple[int, int, int, int], like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, int]:
        """Room for new columns that the caller writes himself, at once.

        Args:
            shape: of the new keys and of the new values, `(B, H, F, D)`.
            like: has their dtype and device.

        Returns:
            The buffers `[B, H, capacity, D]`, and the column from which to write.
        """
        room = self.reserve(shape, like)
        self.claim(shape[2])
        return room

    def reserve(self, shape: tuple[int, int, int, int], like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, int]:
        """As `extend`, but the new columns count only once they are claimed."""
        if not self.is_initialized:
            self.lazy_initialization(like, like)
        start = self.get_seq_length()
        keys = self._key_buffer = with_room(self._key_buffer, shape, like, start)
        values = self._value_buffer = with_room(self._value_buffer, shape, like, start)
        self._reserved = keys, values, start
        return self._reserved

    def claim(self, fed: int) -> bool:
        """Count `fed` columns that were reserved last; False if the layer has changed since."""
        reserved, self._reserved = self._reserved, None
        if reserved is None:
            return False
        keys, values, start = reserved
        if self._key_buffer is not keys or self._value_buffer is not values or self._length != start:
            return False
        self._length = start + fed
        return True

    def holds(self, shape: tuple[int, int, int, int], like: torch.Tensor) -> bool:
        """Whether there are buffers already for keys and values of a shape `(B, H, F, D)` and like a tensor."""
        return all(
            buffer is not None and buffer.dtype is like.dtype and buffer.device == like.device and alike(buffer, shape)
            for buffer in (self._key_buffer, self._value_buffer)
        )

    def shrink(self, length: int) -> None:
        """Keep the first `length` columns."""
        self._length = min(self._length, length)

    def crop(self, tokens_to_remove: int) -> None:
        # Older transformers releases mean the length that is to stay when they give a positive number.
        self.shrink(tokens_to_remove if tokens_to_remove > 0 else self._length + tokens_to_remove)

    def gather(self, columns: torch.Tensor, start: int = 0) -> None:
        """Keep `start` columns and go on with those at `columns[b]` in row b; `columns` is `[B, S']`."""
        if self._key_buffer is None or self._value_buffer is None:
            return
        end = start + columns.shape[1]
        for buffer in (self._key_buffer, self._value_buffer):
            index = columns.to(buffer.device)[:, None, :, None].expand(-1, buffer.shape[1], -1, buffer.shape[3])
            buffer[:, :, start:end] = buffer.gather(2, index)
        self._length = end

    def shift(self, moves: Sequence[tuple[int, int, int]], length: int) -> None:
        """Move columns in some rows; `length` columns are left.

        Args:
            moves: for a row each `(source, destination, count)`, `count` columns from `source` on; columns that
                nothing is moved to stay as they are.
        """
        if self._key_buffer is None or self._value_buffer is None:
            return
        for buffer in (self._key_buffer, self._value_buffer):
            for row, (source, destination, count) in zip(buffer, moves, strict=True):
                if source != destination and count:
                    _move(row, source, destination, count)
        self._length = length

    def keep_rows(self, rows: torch.Tensor) -> None:
        """Keep the given rows of the batch."""
        if self._key_buffer is None or self._value_buffer is None:
            return
        self._reserved = None
        self._key_buffer = self._key_buffer[rows.to(self._key_buffer.device)]
        self._value_buffer = self._value_buffer[rows.to(self._value_buffer.device)]

    def add_rows(self, count: int) -> None:
        """So many rows of zeros join behind the others."""
        if self._key_buffer is None or self._value_buffer is None:
            return
        self._reserved = None
        self._key_buffer, self._value_buffer = (
            torch.cat([buffer, buffer.new_zeros(count, *buffer.shape[1:])])
            for buffer in (self._key_buffer, self._value_buffer)
        )


def _move(row: torch.Tensor, source: int, destination: int, count: int) -> None:
    """Columns of one row's buffer `[H, capacity, D]` to another place, which may overlap with theirs."""
    if row.device.type != "cpu" or not row.is_contiguous():
        row[:, destination : destination + count] = row[:, source : source + count].clone()
        return
    # A row is a few stretches of memory: moved as such in a fraction of the time of torch's indexing.
    column = row.shape[2] * row.element_size()
    start, pitch = row.data_ptr(), row.shape[1] * column
    for head in range(row.shape[0]):
        first = start + head * pitch
        memmove(first + destination * column, first + source * column, count * column)


# A dummy layer stands for one that reads another layer's keys and values; it holds nothing.
READABLE_LAYERS = (
    DynamicLayer,
    DynamicSlidingWindowLayer,
    RollbackLayer,
    *([cache_utils.DummyLayer] if hasattr(cache_utils, "DummyLayer") else []),
)


class RollbackCache(DynamicCache):
    """A cache of `RollbackLayer`s, added as the model asks for them.

    Attributes:
        floor: tokens at the start of every row that must stay. Some of them were never computed here: they fill the
            place of what a caller's cache had let go, which no window sees as long as nothing before it is read again.
        lends: whether keys and values lie where another model could take them.
        apart: layers that hold what a picture showed them, by index, and how many columns of that: no text, never cut.
    """

    lends = True

    def __init__(self) -> None:
        super().__init__()
        self.layer_class_to_replicate = RollbackLayer
        self.floor = 0
        self.apart: dict[int, int] = {}
        self._looks = 2
        self._rooms: Rooms | None = None

    def set_apart(self, expected: int) -> None:
        """After a pass of a model that sees: layers that do not grow with the text are set apart.

        How many columns a picture has may be the prompt's length by chance, so the first two passes are looked at; no
        column is cut between them.

        Args:
            expected: columns of text.

        Raises:
            RollbackError: such a layer has changed.
        """
        lengths = {index: int(layer.get_seq_length()) for index, layer in enumerate(self.layers)}
        if self._looks:
            self._looks -= 1
            found = {index: length for index, length in lengths.items() if length not in (0, expected)}
            if len(found) < len(lengths):
                self.apart |= found
        elif any(lengths[index] != length for index, length in self.apart.items()):
            raise RollbackError("layers that hold what a picture showed them have changed with the text")

    def open(self, count: int, shape: tuple[int, int, int, int], like: torch.Tensor) -> None:
        """Give the layers of a cache that holds nothing, and never has, their buffers, all at once.

        Args:
            count: layers of the model; shape, like: as for `RollbackLayer.extend`.
        """
        layers: list[Any] = self.layers
        if self.apart or len(layers) > count or any(type(layer) is not RollbackLayer for layer in layers):
            return
        if any(layer.is_initialized for layer in layers):
            return
        layers.extend(RollbackLayer() for _ in range(count - len(layers)))
        for layer, (keys, values) in zip(layers, buffers(count, shape, like), strict=True):
            layer.lazy_initialization(like, like)
            layer._key_buffer, layer._value_buffer = keys, values

    def extend(
        self, index: int, shape: tuple[int, int, int, int], like: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, int]:
        """`RollbackLayer.extend` of one layer, which is added if the model has not asked for it before."""
        while len(self.layers) <= index:
            self.layers.append(RollbackLayer())
        layer = self.layers[index]
        assert isinstance(layer, RollbackLayer)
        return layer.extend(shape, like)

    def rooms(self, count: int, shape: tuple[int, int, int, int], like: torch.Tensor) -> Rooms | None:
        """The buffers of all layers for new columns, which count only once they are claimed.

        Args:
            count: of layers; shape, like: as for `RollbackLayer.extend`.

        Returns:
            The same object for as long as they are the same; None where they have to be made or widened first.
        """
        layers: list[Any] = self.layers
        if self.apart or len(layers) != count or set(map(type, layers)) != {RollbackLayer}:
            return None
        lengths = set(map(_LENGTH, layers))
        if len(lengths) > 1:
            return None
        found = self._rooms
        if found is None or not all(map(is_, chain(*found.pairs), chain(map(_KEYS, layers), map(_VALUES, layers)))):
            found = self._rooms = rooms_of(list(zip(map(_KEYS, layers), map(_VALUES, layers), strict=True)))
        if found is not None:
            found.start = lengths.pop()
        return found if found is not None and found.take(shape, like) else None

    def rooms_from(
        self, start: int, count: int, shape: tuple[int, int, int, int], like: torch.Tensor, moment: object
    ) -> Rooms | None:
        """As `rooms`, for columns behind the first `start`; looked for once a moment."""
        found, layers = self._rooms, self.layers
        # Layers are widened together; what else replaces a buffer does not come between two passes of a moment.
        known = found is not None and found.seen is moment and _KEYS(layers[0]) is found[0][0]
        if found is None or not known or _KEYS(layers[-1]) is not found[-1][0]:
            found = self.rooms(count, shape, like)
            if found is None or found.start < start:
                return None
            found.seen = moment
        found.start = start
        return found if found.take(shape, like) else None

    def claim(self, rooms: Rooms, fed: int) -> bool:
        """`fed` columns were written to the buffers; False if those are others by now."""
        layers: list[Any] = self.layers
        if self._rooms is not rooms or set(map(_LENGTH, layers)) != {rooms.start}:
            return False
        for layer in layers:
            layer._length = rooms.start + fed
        return True

    def hold(self, length: int) -> None:
        """So many columns are held by now, in layers that all grow: they were written to the buffers."""
        layers: list[Any] = self.layers
        for layer in layers:
            layer._length = length

    @property
    def rollable(self) -> list[Any]:
        """The layers that hold keys and values of the text."""
        if not self.apart:
            found: list[Any] = self.layers
            return found
        return [layer for index, layer in enumerate(self.layers) if index not in self.apart]

    @property
    def length(self) -> int:
        """Columns held, the same in every layer.

        Raises:
            RollbackError: layers disagree, which only a forward pass that failed midway can bring about.
        """
        lengths = {layer.get_seq_length() for layer in self.rollable}
        if len(lengths) > 1:
            raise RollbackError(f"the cache's layers hold different numbers of tokens: {sorted(lengths)}")
        return int(lengths.pop()) if lengths else 0

    def shrink(self, length: int) -> None:
        """Keep the first `length` columns of every layer, and check that they are what is left."""
        for layer in self.rollable:
            layer.shrink(length)
        if self.rollable and self.length != length:
            raise RollbackError(f"rolling back to {length} tokens left {self.length} in the cache")

    def realign(self, lengths: list[int], keep: list[int]) -> int:
        """Drop the end of each row and push the rest to the right edge.

        Args:
            lengths: columns that row b fills, ending at the cache's right edge.
            keep: how many of those, counted from their left, row b keeps.

        Returns:
            The new number of columns, `max(keep)`.

        Raises:
            RollbackError: a row would be rolled back behind `floor`.
        """
        if min(keep) < self.floor:
            raise RollbackError(
                f"rolling back to {min(keep)} tokens would show windows what the cache does not hold of the first "
                f"{self.floor}"
            )
        # The cache may be wider than its longest row, when that row has left the batch.
        width, new_width = self.length, max(keep)
        if new_width == 0:
            self.shrink(0)
            return 0
        # Row b's first column moves from (width - lengths[b]) to (new_width - keep[b]).
        moves = [(width - have, new_width - left, left) for have, left in zip(lengths, keep, strict=True)]
        if all(source == destination for source, destination, _ in moves):
            self.shrink(new_width)
            return new_width
        for layer in self.rollable:
            layer.shift(moves, new_width)
        return new_width

    def pick(self, columns: torch.Tensor) -> None:
        """Make column c of row b what is now column `columns[b, c]`; `columns` is `[B, S']`."""
        same = (columns == torch.arange(columns.shape[1])).all(dim=0)
        start = int(same.long().cumprod(0).sum())
        for layer in self.rollable:
            if start == columns.shape[1]:
                layer.shrink(start)
            else:
                layer.gather(columns[:, start:], start)

    def keep_rows(self, rows: list[int]) -> None:
        """Keep the given rows of the batch."""
        index = torch.tensor(rows)
        for layer in [*self.rollable, *(self.layers[apart] for apart in self.apart)]:
            layer.keep_rows(index)

    def add_rows(self, count: int) -> None:
        """So many rows that hold nothing join behind the others."""
        for layer in self.rollable:
            layer.add_rows(count)
