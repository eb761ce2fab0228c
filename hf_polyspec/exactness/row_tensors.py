# SPDX-License-Identifier: Apache-2.0
"""Values over a vocabulary for rows of different lengths, without a number for a position that no row has.

One row that drafts 24 tokens beside 15 that draft none would make a rectangle of 400 positions out of 40; with 50
thousand ids, filling it takes longer than a small model's pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import overload

import torch
from torch import nn


class RowTensors:
    """`[k_b, V]` for every row b, k_b at least 1.

    Args:
        rows: parts of what a model said, on its device and in its type.
        device: where they are looked at, as float32 or wider.
        whole: `[B k, V]`, of which the rows are equal parts, one behind the other; None where they are not.
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
        size = places[0][1]
        equal = all(place == (b * size, size) for b, place in enumerate(places)) and len(values) == len(places) * size
        return cls([values[first : first + count] for first, count in places], device, values if equal else None)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, place: tuple[int, int]) -> torch.Tensor:
        """`[V]`, of a row and a position of it."""
        return self._seen(self.rows[place[0]][place[1]])

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
        if self.whole is not None:
            return self._seen(self.whole).reshape(len(self.rows), -1, self.whole.shape[-1])
        width = max(map(len, self.rows))
        if all(len(row) == width for row in self.rows):
            return self._seen(torch.stack(self.rows))
        return self._seen(torch.stack([torch.cat([row, row[-1:].expand(width - len(row), -1)]) for row in self.rows]))

    def alike(self) -> list[list[int]]:
        """Rows in groups, in each of which none is more than twice as long as another."""
        found: dict[int, list[int]] = {}
        for b, row in enumerate(self.rows):
            found.setdefault((len(row) - 1).bit_length(), []).append(b)
        return list(found.values())

    def _seen(self, values: torch.Tensor) -> torch.Tensor:
        return values.to(device=self.device, dtype=torch.promote_types(values.dtype, torch.float32))


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
