# SPDX-License-Identifier: Apache-2.0
"""The cache of an EAGLE head's keys and values."""

from __future__ import annotations

import torch

_GROWTH = 256
"""Entries of room beyond what is needed, when a buffer grows."""


class HeadCache:
    """Keys and values of an EAGLE head, one entry per (feature, token) pair, the same count in every row.

    Rows of different length are kept equal by padding; which entries of a row are real is the business of the
    caller's attention mask. Entries live in preallocated buffers, so appending copies only what is new and
    dropping speculative entries (`crop`) copies nothing.
    """

    def __init__(self) -> None:
        self.length = 0
        self._keys: list[torch.Tensor] = []
        self._values: list[torch.Tensor] = []
        self._positions: torch.Tensor | None = None

    def append(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Adds entries to one layer and returns all of that layer's entries.

        The length counts once all layers have been fed, that is after `advance`.

        Args:
            layer: Index of the layer.
            key: `[B, n_kv, T, d]`, rotated.
            value: `[B, n_kv, T, d]`.

        Returns:
            Keys and values `[B, n_kv, length + T, d]`.

        Raises:
            ValueError: If the batch size differs from that of the entries already held.
        """
        stop = self.length + key.shape[2]
        if layer == len(self._keys):
            self._keys.append(key.new_empty((*key.shape[:2], 0, key.shape[3])))
            self._values.append(value.new_empty((*value.shape[:2], 0, value.shape[3])))
        if self._keys[layer].shape[0] != key.shape[0]:
            raise ValueError(f"The head's cache holds {self._keys[layer].shape[0]} rows and was given {key.shape[0]}.")
        self._keys[layer] = _write(self._keys[layer], key, self.length)
        self._values[layer] = _write(self._values[layer], value, self.length)
        return self._keys[layer][:, :, :stop], self._values[layer][:, :, :stop]

    def reserve(self, layer: int, shape: tuple[int, int, int, int], like: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Room behind the entries of one layer, into which somebody else writes new ones.

        Args:
            layer: Index of the layer.
            shape: Of the new keys, `[B, n_kv, T, d]`; like: of their dtype and device.

        Returns:
            The buffers of keys and values `[B, n_kv, capacity, d]`, contiguous; the new entries' first is `length`.

        Raises:
            ValueError: If the batch size differs from that of the entries already held.
        """
        if layer >= len(self._keys) or self._keys[layer].shape[2] < self.length + shape[2]:
            new = like.new_empty(shape)
            self.append(layer, new, new)
        elif self._keys[layer].shape[0] != shape[0]:
            raise ValueError(f"The head's cache holds {self._keys[layer].shape[0]} rows and was given {shape[0]}.")
        return self._keys[layer], self._values[layer]

    def append_positions(self, position_ids: torch.Tensor) -> torch.Tensor:
        """Adds the positions `[B, T]` of new entries and returns those of all, `[B, length + T]`.

        Only heads with a sliding window ask for this, before `advance`.
        """
        new = position_ids[:, None, :, None]
        held = new.new_empty((len(new), 1, 0, 1)) if self._positions is None else self._positions
        self._positions = _write(held, new, self.length)
        return self._positions[:, 0, : self.length + new.shape[2], 0]

    def advance(self, count: int) -> None:
        """Counts `count` appended entries as held, after every layer has appended them."""
        self.length += count

    def crop(self, length: int) -> None:
        """Forgets every entry from `length` on.

        Raises:
            ValueError: If fewer entries are held.
        """
        if not 0 <= length <= self.length:
            raise ValueError(f"Cannot crop a cache of {self.length} entries to {length}.")
        self.length = length

    def gather(self, index: torch.Tensor) -> None:
        """Keeps, in every row, the entries at the given places in the given order.

        Args:
            index: `[B, S]` places in `0..length-1`; a place may be repeated (for padding).

        Raises:
            ValueError: If the shape or a place does not fit.
        """
        if index.dim() != 2 or (self._keys and index.shape[0] != self._keys[0].shape[0]):
            raise ValueError(f"Places must be given as [batch, entries], got {tuple(index.shape)}.")
        if index.numel() and (int(index.min()) < 0 or int(index.max()) >= self.length):
            raise ValueError(f"A place lies outside the {self.length} entries held.")
        self._keys = [_take(keys, index) for keys in self._keys]
        self._values = [_take(values, index) for values in self._values]
        if self._positions is not None:
            self._positions = _take(self._positions, index)
        self.length = index.shape[1]

    def select_rows(self, rows: torch.Tensor) -> None:
        """Keeps the given rows of the batch, `[B']`, in the given order (a row may be repeated)."""
        self._keys = [keys.index_select(0, rows.to(keys.device)) for keys in self._keys]
        self._values = [values.index_select(0, rows.to(values.device)) for values in self._values]
        if self._positions is not None:
            self._positions = self._positions.index_select(0, rows.to(self._positions.device))

    def add_rows(self, count: int) -> None:
        """Adds rows of zeros behind the others, with as many entries."""
        self._keys = [_more_rows(keys, count) for keys in self._keys]
        self._values = [_more_rows(values, count) for values in self._values]
        if self._positions is not None:
            self._positions = _more_rows(self._positions, count)

    def layer(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the keys and values `[B, n_kv, length, d]` that one layer holds."""
        return self._keys[layer][:, :, : self.length], self._values[layer][:, :, : self.length]


def _write(buffer: torch.Tensor, new: torch.Tensor, start: int) -> torch.Tensor:
    if new.requires_grad:  # autograd forbids writing into a buffer it still needs
        return torch.cat((buffer[:, :, :start], new), dim=2)
    stop = start + new.shape[2]
    if buffer.shape[2] < stop:
        capacity = max(stop, buffer.shape[2] + buffer.shape[2] // 2) + _GROWTH
        grown = new.new_empty((*new.shape[:2], capacity, new.shape[3]))
        grown[:, :, :start] = buffer[:, :, :start]
        buffer = grown
    buffer[:, :, start:stop] = new
    return buffer


def _more_rows(entries: torch.Tensor, count: int) -> torch.Tensor:
    return torch.cat((entries, entries.new_zeros((count, *entries.shape[1:]))))


def _take(entries: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    # [B, S] -> [B, n_kv, S, d]
    places = index.to(entries.device)[:, None, :, None].expand(-1, entries.shape[1], -1, entries.shape[3])
    return entries.gather(2, places)
