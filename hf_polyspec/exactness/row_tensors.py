# SPDX-License-Identifier: Apache-2.0
"""Values over a vocabulary for rows of different lengths, without a number for a position that no row has.

One row that drafts 24 tokens beside 15 that draft none would make a rectangle of 400 positions out of 40; with 50
thousand ids, filling it takes longer than a small model's pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import overload

import torch
from torch import nn


class RowTensors:
    """`[k_b, V]` for every row b, k_b at least 1.

    Args:
        rows: parts of what a model said, on its device and in its type.
        device: where they are looked at, as float32 or wider.
        whole: `[M, V]`, of which the rows are the parts, one behind the other; None where they are not.
    """

    def __init__(self, rows: Sequence[torch.Tensor], device: torch.device, whole: torch.Tensor | None = None) -> None:
        self.rows = list(rows)
        self.device = device
        self.whole = whole

    @classmethod
    def of(cls, values: torch.Tensor, places: Sequence[tuple[int, int]], device: torch.device) -> RowTensors:
        """Rows of `[M, V]`.

        Args:
            places: per row, its first position and how many it has.
        """
        ends = [0, *accumulate(count for _, count in places)]
        parts = ends[-1] == len(values) and all(first == end for (first, _), end in zip(places, ends, strict=False))
        return cls([values[first : first + count] for first, count in places], device, values if parts else None)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, place: tuple[int, int]) -> torch.Tensor:
        """`[V]`, of a row and a position of it."""
        return self._seen(self.rows[place[0]][place[1]])

    def at(self, places: Sequence[tuple[int, int]]) -> torch.Tensor:
        """`[n, V]`, of rows and positions of them; a row's last stands for those that it has not."""
        return self._seen(torch.stack([self.rows[b][min(i, len(self.rows[b]) - 1)] for b, i in places]))

    def select(self, rows: Sequence[int]) -> RowTensors:
        """Of some rows, in this order."""
        return RowTensors([self.rows[row] for row in rows], self.device)

    def fitted(self, size: int) -> RowTensors:
        """The same over `size` ids: those beyond are left out, those that are lacking can never be."""
        have = self.rows[0].shape[-1]
        if have == size:
            return self
        lacking = (0, max(0, size - have))
        rows = [nn.functional.pad(row[:, :size], lacking, value=float("-inf")) for row in self.rows]
        return RowTensors(rows, self.device)

    def rectangle(self) -> torch.Tensor:
        """`[B, K, V]` with K of the longest row; what is beyond a row's own repeats its last and means nothing."""
        sizes = self.sizes
        width = max(sizes)
        if min(sizes) == width:
            return self.columns(range(len(sizes))).reshape(len(sizes), width, -1)
        return self._seen(torch.stack([torch.cat([row, row[-1:].expand(width - len(row), -1)]) for row in self.rows]))

    def columns(self, rows: Sequence[int]) -> torch.Tensor:
        """`[M, V]`, the positions of some rows, one row behind the other."""
        if self.whole is not None and list(rows) == list(range(len(self.rows))):
            return self._seen(self.whole)
        return self._seen(torch.cat([self.rows[row] for row in rows]))

    @property
    def sizes(self) -> list[int]:
        """How many positions each row has."""
        return [len(row) for row in self.rows]

    def _seen(self, values: torch.Tensor) -> torch.Tensor:
        return values.to(device=self.device, dtype=torch.promote_types(values.dtype, torch.float32))


def picked(values: torch.Tensor | RowTensors, places: Sequence[tuple[int, int]]) -> torch.Tensor:
    """`[n, V]`, of each row and position of `[B, K, V]`; at least one, and none of the others is touched."""
    if isinstance(values, RowTensors):
        return values.at(places)
    return torch.stack([values[place] for place in places])


@overload
def fit_vocabulary(logits: torch.Tensor, size: int) -> torch.Tensor: ...


@overload
def fit_vocabulary(logits: torch.Tensor | RowTensors, size: int) -> torch.Tensor | RowTensors: ...


def fit_vocabulary(logits: torch.Tensor | RowTensors, size: int) -> torch.Tensor | RowTensors:
    """Cut or pad the last dimension to `size`: models of one family round their vocabularies up differently.

    Padding columns get -inf: a level cannot propose an id it has no row for.
    """
    if isinstance(logits, RowTensors):
        return logits.fitted(size)
    have = logits.shape[-1]
    if have > size:
        return logits[..., :size]
    if have < size:
        return nn.functional.pad(logits, (0, size - have), value=float("-inf"))
    return logits
