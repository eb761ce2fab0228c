# SPDX-License-Identifier: Apache-2.0
"""Keys and values of rows that each have a region of their own.

All regions lie side by side in one buffer a layer, at the same places in every layer. How many columns of its region a
row fills is known to whoever reads the ids (law 4), so that rolling back a row is forgetting a number.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from transformers.cache_utils import DynamicCache, DynamicLayer

from .cache import RollbackCache
from .release import inner_model
from .rooms import Rooms, rooms_of
from .span import Span
from .spans import pass_under_way

_MORE_ROOM = 64
_PIECE = 32
"""Columns from which on it is quicker to copy those of each row by themselves."""
OUTGROWN = 2
"""Windows from which on a text is so long that its layers had better forget what lies before."""
_MARGIN = 64
"""Columns behind a window that stay when others are let go: a row that is rolled back so far is not read again."""
ALIGNED = 16
"""Regions begin and end at multiples of so many columns."""


class Regions:
    """Where each row's columns are.

    Args:
        rows: of the batch.
        window: columns that a new one may see, itself included; None for all. With a window the oldest columns are let
            go, but for some that a row which is rolled back would see again.

    Attributes:
        bases: first column of each row's region; rooms: columns of it.
        dropped: columns of each row's text that its region no longer holds, the oldest.
        capacity: columns of all regions, and of what is between them.
        changes: how often a layer was given other buffers.
    """

    def __init__(self, rows: int, window: int | None = None) -> None:
        self.window = window
        self.bases = [0] * rows
        self.rooms = [0] * rows
        self.dropped = [0] * rows
        self.capacity = 0
        self.changes = 0

    def usable(self, row: int, held: int) -> int:
        """How many of the first `held` columns of a row's text need not be read again: all of them, or none."""
        dropped = self.dropped[row]
        return held if not dropped or (self.window is not None and held >= dropped + self.window) else 0

    def reserve(self, row: int, held: int, columns: int) -> tuple[int, int, int]:
        """Make room for a row's text of so many columns, the first `held` of which are usable.

        Returns:
            What moves: from where, to where, and how many columns.
        """
        before, dropped = self.bases[row], self.dropped[row] if held else 0
        self.dropped[row] = dropped
        if columns - dropped <= self.rooms[row]:
            return before, before, 0
        first = dropped if self.window is None else max(dropped, held - self.window - _MARGIN)
        self.dropped[row], needed = first, columns - first
        if needed > self.rooms[row]:
            self._settle(row, needed + max(_MORE_ROOM, 0 if self.window is not None else columns // 2))
        return before + first - dropped, self.bases[row], held - first

    def _settle(self, row: int, room: int) -> None:
        """Give a row a region of so many columns, in the first gap that is large enough, or behind all the others."""
        room = (room + ALIGNED - 1) // ALIGNED * ALIGNED
        taken = sorted((base, base + size) for base, size in zip(self.bases, self.rooms, strict=True) if size)
        start = 0
        for base, end in taken:
            if base - start >= room:
                break
            start = max(start, end)
        self.bases[row], self.rooms[row] = start, room
        if start + room > self.capacity:
            self.capacity = max(start + room, self.capacity + self.capacity // 2) // ALIGNED * ALIGNED

    def keep(self, rows: Sequence[int]) -> None:
        """Only these rows' regions stay; a row that is named again begins with nothing."""
        again = [row in rows[:place] for place, row in enumerate(rows)]
        for name in ("bases", "rooms", "dropped"):
            values = getattr(self, name)
            setattr(self, name, [0 if more else values[row] for row, more in zip(rows, again, strict=True)])

    def add(self, count: int) -> None:
        """So many more rows, which hold nothing."""
        for values in (self.bases, self.rooms, self.dropped):
            values += [0] * count

    def place(self, row: int, position: int) -> int:
        """The column of a position of a row's text."""
        return self.bases[row] + position - self.dropped[row]


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
        group = under_way.groups[self.regions.window]
        written = group.written(key_states.device)
        self.keys.index_copy_(2, written, key_states)
        self.values.index_copy_(2, written, value_states)
        under_way.owners[self.keys.data_ptr()] = group
        return self.keys, self.values

    def fit(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Give the buffers the columns of all regions, for keys and values `[1, H, N, D]` like these."""
        if not self.is_initialized:
            self.lazy_initialization(keys, values)
            self.keys = self.values = None
        capacity = self.regions.capacity
        if self.keys is None or self.keys.shape[2] < capacity:
            self.keys, self.values = _wider(self.keys, keys, capacity), _wider(self.values, values, capacity)
            self.regions.changes += 1

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
        """Columns to another place."""
        if self.keys is not None:
            self.fit(self.keys, self.values)
            for states in (self.keys, self.values):
                moved = states[:, :, source : source + count]
                overlaps = abs(source - target) < count
                states[:, :, target : target + count] = moved.clone() if overlaps else moved

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
    """A cache of `RaggedLayer`s.

    Args:
        rows: of the batch; model: whose own cache says which of its layers see a window only.
    """

    def __init__(self, rows: int, model: Any) -> None:
        super().__init__()
        self.windows = windows_of(model)
        self.regions = {window: Regions(rows, window) for window in {None, *self.windows}}
        self._rooms: tuple[Any, Rooms | None] = (), None
        self.layer_class_to_replicate: Any = lambda *_args, **_kwargs: self._layer(len(self.layers))

    def _layer(self, index: int) -> RaggedLayer:
        return RaggedLayer(self.regions[self.windows[index] if index < len(self.windows) else None])

    def open(self, index: int, shape: tuple[int, int, int, int], like: torch.Tensor) -> None:
        """Give a layer buffers, before anything is read into it.

        Args:
            index: of the layer, which exists or is the next one; shape, like: as for `RaggedLayer.holds`.
        """
        if index == len(self.layers):
            self.layers.append(self._layer(index))
        layer = self.ragged_layers[index]
        if layer.keys is None:
            nothing = like.new_empty(1, shape[1], 0, shape[3])
            layer.fit(nothing, nothing)

    def extend(
        self, index: int, shape: tuple[int, int, int, int], like: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, int]:
        """A layer's buffers, for whoever writes the pass's columns to their places at once."""
        layer = self.ragged_layers[index]
        return layer.keys, layer.values, 0

    def rooms(self, count: int, shape: tuple[int, int, int, int], like: torch.Tensor) -> Rooms | None:
        """The buffers of the first layers, for whoever writes the columns of the pass under way to all of them.

        Args:
            count: of layers, all of which hold whole texts; shape, like: as for `RaggedLayer.holds`.

        Returns:
            The same object for as long as they are the same; None where not all of them take such columns.
        """
        found = self.rooms_of_regions(count)
        return found if found is not None and self.ragged_layers[0].holds(shape, like) else None

    def rooms_of_regions(self, count: int) -> Rooms | None:
        """`rooms`, whatever is written there."""
        regions, layers = self.regions[None], self.ragged_layers[:count]
        mark = count, regions.changes, regions.capacity
        if self._rooms[0] != mark:
            fit = len(layers) == count and all(
                type(layer) is RaggedLayer and layer.regions is regions for layer in layers
            )
            self._rooms = mark, rooms_of([(layer.keys, layer.values) for layer in layers]) if fit else None
        return self._rooms[1]

    def claim(self, rooms: Rooms, fed: int) -> bool:
        """The columns of the pass were written to the buffers; False if there are others by now."""
        return self._rooms[1] is rooms

    @property
    def ragged_layers(self) -> list[Any]:
        """The layers that hold keys and values."""
        found: list[Any] = self.layers
        return found

    def fit(self) -> None:
        """Give every layer that holds something the columns of all regions."""
        for layer in self.ragged_layers:
            if layer.keys is not None:
                layer.fit(layer.keys, layer.values)

    def usable(self, row: int, held: int) -> int:
        """How many of the first `held` columns of a row's text need not be read again, in any layer."""
        return min(regions.usable(row, held) for regions in self.regions.values())

    def reserve(self, row: int, held: int, columns: int) -> None:
        """Make room for so many columns of a row, the first `held` of which are usable and stay what they are."""
        for regions in self.regions.values():
            source, target, count = regions.reserve(row, held, columns)
            if source != target and count > 0:
                for layer in self.ragged_layers:
                    if layer.regions is regions:
                        layer.move(source, target, count)

    def spans(self, row: int, span: Span) -> dict[int | None, Span]:
        """A row's span in layers of every kind; its base is filled in."""
        return {
            window: replace(span, base=regions.bases[row], dropped=regions.dropped[row])
            for window, regions in self.regions.items()
        }

    def copy(self, source: int, target: int, first: int, end: int) -> None:
        """Positions `first` to `end`, exclusive, of one row's text to those of another one, which has room."""
        for layer in self.ragged_layers:
            at = layer.regions.place
            layer.move(at(source, first), at(target, first), end - first)

    def copy_from(self, other: RaggedCache, taken: Sequence[tuple[int, int, int]]) -> None:
        """Positions of rows' texts in another model's cache: `(row, first, end)` each; there is room for them.

        A row of which the other cache no longer holds all of that begins where it does; else what it holds stays.
        """
        places: dict[int | None, list[tuple[int, int, int]]] = {}
        for window, regions in self.regions.items():
            theirs, found = other.regions[window], places.setdefault(window, [])
            for row, first, end in taken:
                if theirs.dropped[row] > first:
                    regions.dropped[row] = theirs.dropped[row]
                start = max(first, regions.dropped[row])
                found.append((theirs.place(row, start), regions.place(row, start), end - start))
        for index, layer in enumerate(other.ragged_layers):
            if layer.keys is None:
                continue
            while len(self.layers) <= index:
                self.layers.append(self._layer(len(self.layers)))
            own = self.ragged_layers[index]
            own.fit(layer.keys, layer.values)
            pieces = places[own.regions.window]
            pairs = (own.keys, layer.keys), (own.values, layer.values)
            if max(count for _, _, count in pieces) >= _PIECE:
                for states, lent in pairs:
                    for source, target, count in pieces:
                        states.narrow(2, target, count).copy_(lent.narrow(2, source, count))
                continue
            from_, to = (
                torch.cat([torch.arange(piece[end], piece[end] + piece[2]) for piece in pieces]).to(own.keys.device)
                for end in (0, 1)
            )
            for states, lent in pairs:
                states.index_copy_(2, to, lent.index_select(2, from_).to(states.dtype))

    def pick(self, moves: Sequence[tuple[int, int, int]]) -> None:
        """Positions of rows' texts to other ones, all at once: `(row, from, to)` each."""
        moves = [move for move in moves if move[1] != move[2]]
        if not moves:
            return
        for regions in self.regions.values():
            sources, targets = (
                torch.tensor([regions.place(row, position) for row, position in pairs])
                for pairs in ([(row, one) for row, one, _ in moves], [(row, other) for row, _, other in moves])
            )
            for layer in self.ragged_layers:
                if layer.regions is regions:
                    layer.pick(sources, targets)

    def keep_rows(self, rows: Sequence[int]) -> None:
        """Only these rows stay; one that is named again begins with nothing."""
        for regions in self.regions.values():
            regions.keep(rows)

    def add_rows(self, count: int) -> None:
        """So many more rows, which hold nothing."""
        for regions in self.regions.values():
            regions.add(count)

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
                for row, length in enumerate(lengths):
                    first = layer.regions.dropped[row]
                    base = layer.regions.bases[row]
                    whole[row, :, width - length + first :] = states[0, :, base : base + length - first]
                pair.append(whole)
            made.update(*pair, index)
        return made


def outgrows(model: Any, columns: int) -> bool:
    """Whether layers with a window would hold much less than a text of so many columns, were they to hold only that."""
    windows = [window for window in windows_of(model) if window is not None]
    return bool(windows) and columns > OUTGROWN * min(windows) + _MARGIN


def windows_of(model: Any) -> list[int | None]:
    """Per layer, the columns of its window, as the cache says that transformers itself would give the model."""
    try:
        layers = DynamicCache(config=inner_model(model).config.get_text_config(decoder=True)).layers
    except Exception:  # a config of a form of its own: then every layer holds whole texts, which is right under any
        return []
    found = [
        getattr(layer, "sliding_window", None) if getattr(layer, "is_sliding", False) else None for layer in layers
    ]
    return [window if isinstance(window, int) else None for window in found]
