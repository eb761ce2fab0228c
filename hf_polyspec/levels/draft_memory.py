# SPDX-License-Identifier: Apache-2.0
"""What a head is helped with beside its own guesses, for every row of a batch."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..exactness.row_tensors import RowTensors, picked
from ..exactness.tree_geometry import path_to
from .copying import CopyPointer
from .foreseen import ForeseenPointer
from .pointers import Place, PointerMixture
from .recycling import WEIGHTS, RecyclePointer, Said, said_after


class DraftMemory:
    """The texts of a batch, what the level above foresaw of them, and what it said about what was drafted after them.

    Attributes:
        foreseen: of each row, what the level above foresaw of its prompt.
    """

    def __init__(self) -> None:
        self.begin(0)

    def begin(self, batch: int) -> None:
        """Forget everything; so many rows are to come."""
        self._copies = [CopyPointer() for _ in range(batch)]
        self.foreseen = [ForeseenPointer() for _ in range(batch)]
        self._recycled = [RecyclePointer() for _ in range(batch)]

    def keep_rows(self, rows: Sequence[int]) -> None:
        """Go on with some of the rows; the text of one that is wanted twice is indexed anew in its second place.

        Args:
            rows: which, in their new order.
        """
        self._copies = [CopyPointer() if r in rows[:i] else self._copies[r] for i, r in enumerate(rows)]
        self.foreseen = [self.foreseen[r].copied() for r in rows]
        self._recycled = [self._recycled[r].copied() for r in rows]

    def add_rows(self, count: int) -> None:
        """So many rows join, whose texts begin anew."""
        self._copies = [*self._copies, *(CopyPointer() for _ in range(count))]
        self.foreseen = [*self.foreseen, *(ForeseenPointer() for _ in range(count))]
        self._recycled = [*self._recycled, *(RecyclePointer() for _ in range(count))]

    def follow(self, texts: Sequence[list[int]]) -> PointerMixture:
        """Bring each row to its text.

        Args:
            texts: the ids of each row, without padding.
        """
        rows = list(zip(self._copies, self.foreseen, self._recycled, strict=True))
        for row, text in zip(rows, texts, strict=True):
            for pointer in row:
                pointer.follow(text)
        return PointerMixture(rows)

    def learn(
        self,
        tokens: Sequence[list[int]],
        parents: Sequence[list[int]],
        paths: Sequence[list[int]],
        logits: torch.Tensor | RowTensors,
        sampled: Sequence[bool],
    ) -> None:
        """Take in what the level above said after the nodes that it rejected.

        Args:
            tokens, parents: the trees that were drafted after the texts last followed, see `TreeProposal`.
            paths: per row, the accepted nodes.
            logits: `[B, T + 1, V]` of the level above, column j + 1 after node j.
            sampled: per row, whether text is drawn from them.
        """
        rejected = [
            [node for node in range(len(row)) if node not in path] for row, path in zip(tokens, paths, strict=True)
        ]
        places = [(b, node + 1) for b, nodes in enumerate(rejected) for node in nodes]
        laws = iter(said_after(picked(logits, places), [sampled[b] for b, _ in places]) if places else [])
        for b, (pointer, nodes) in enumerate(zip(self._recycled, rejected, strict=True)):
            said: dict[Place, Said] = {}
            for node in nodes:
                ids = [tokens[b][n] for n in path_to(node, parents[b])]
                said[(*pointer.root(), *ids)[-len(WEIGHTS) :]] = next(laws)
            pointer.learn(said)
