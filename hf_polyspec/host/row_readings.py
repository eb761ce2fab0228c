# SPDX-License-Identifier: Apache-2.0
"""What rows are to read in a pass over columns of several of them, which go together, and what came out of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch

from ..exactness.tree_geometry import depths

WIDEST = 2048
"""Most columns of a pass over several rows; a row that has more to read goes alone."""
_ALIKE = 16
"""From so many columns on, rows that read the same ids in the same place are read once."""


@dataclass(frozen=True)
class Reading:
    """What one row is to read in a pass.

    Attributes:
        row: its place in the batch.
        ids: all of its own, the new ones at their end; held: how many of them the cache holds.
        wanted: columns at the end whose logits are wanted.
        parents: of the tree's nodes that end `ids`, empty without a tree.
        like: the row that reads exactly the same, or None.
    """

    row: int
    ids: list[int]
    held: int
    wanted: int
    parents: list[int]
    like: int | None = None

    @property
    def count(self) -> int:
        """Columns that are fed."""
        return len(self.ids) - self.held


def places_of(one: Reading) -> list[int]:
    """Of the columns of a row that ends with a tree: their places in its text, which siblings share."""
    context = len(one.ids) - len(one.parents)
    return [*range(one.held, context), *(context - 1 + depth for depth in depths(one.parents))]


def once(readings: list[Reading]) -> tuple[list[Reading], list[Reading]]:
    """Those that are to be read, and those of which an equal one is among them."""
    whole: list[Reading] = []
    twins: list[Reading] = []
    for one in readings:
        like = None if one.count < _ALIKE else next((other for other in whole if _same(one, other)), None)
        if like is None:
            whole.append(one)
        else:
            twins.append(replace(one, like=like.row))
    return whole, twins


def _same(one: Reading, other: Reading) -> bool:
    return (one.held, one.wanted, one.parents) == (other.held, other.wanted, other.parents) and one.ids == other.ids


def groups_of(readings: list[Reading]) -> list[list[Reading]]:
    """Rows that go together in one pass."""
    groups: list[list[Reading]] = [[]]
    room = WIDEST
    for one in readings:
        if groups[-1] and one.count > room:
            groups.append([])
            room = WIDEST
        groups[-1].append(one)
        room -= one.count
    return groups


class Padded(Sequence[list[int]]):
    """What rows have read, with their padding before it; put together for whoever looks, since most often nobody does.

    Args:
        ids: of each row, padding included; pads: columns of it; own: what each has read.
    """

    def __init__(self, ids: Sequence[list[int]], pads: Sequence[int], own: Sequence[list[int]]) -> None:
        self._ids, self._pads, self._own = ids, pads, list(own)

    def __len__(self) -> int:
        return len(self._own)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)

    def __getitem__(self, row: Any) -> Any:
        if isinstance(row, slice):
            return [self[one] for one in range(*row.indices(len(self)))]
        pad, own = self._pads[row], self._own[row]
        return self._ids[row][:pad] + own if pad else own


class Spread:
    """What passes over columns of several rows gave, with hidden states in the shape `[B, F, H]` that rows are read in.

    Args:
        outputs: of the passes; firsts: where in all of their columns a row's begin, None for none.
        counts: a row's columns; fed: the most of them.
    """

    def __init__(self, outputs: list[Any], firsts: list[int | None], counts: list[int], fed: int) -> None:
        self.outputs = outputs
        self._index = [
            [0] * fed if first is None else [max(first, first + count - fed + i) for i in range(fed)]
            for first, count in zip(firsts, counts, strict=True)
        ]

    @cached_property
    def hidden_states(self) -> Sequence[torch.Tensor | None]:
        """As the model's, rows ending at the right edge; what stands before a row's own columns means nothing."""
        layers = zip(*(output.hidden_states for output in self.outputs), strict=True)
        return [None if parts[0] is None else self._rows(parts) for parts in layers]

    def _rows(self, parts: tuple[torch.Tensor, ...]) -> torch.Tensor:
        states = parts[0][0] if len(parts) == 1 else torch.cat([part[0] for part in parts])  # [N, H]
        return states[torch.tensor(self._index, device=states.device)]
