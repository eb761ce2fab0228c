# SPDX-License-Identifier: Apache-2.0
"""What one forward pass said, and which ids it had read when it did."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch

from .row_tensors import RowTensors


@dataclass(frozen=True)
class Picks:
    """What a pass said, where nobody asks for more than the likeliest ids.

    Attributes:
        tokens: per row, K + 1 of them, behind the context and behind each draft token; none for rows that were not
            asked. leads: by how many logits each is ahead.
        fed, read, counts: as of a `Pass`.
    """

    tokens: list[list[int]]
    leads: list[list[float]]
    fed: int
    read: Sequence[list[int]]
    counts: list[int] | None = None


@dataclass(frozen=True)
class Pass:
    """One forward pass over the uncached end of each row and its draft.

    Attributes:
        given: see `logits`; as `RowTensors` where rows have lengths of their own.
        output: the model's own output (hidden states and attentions, when asked for).
        fed: columns F of this pass; a row's tokens end at the right edge.
        read: per row, the ids the model has now read; the last F of them were fed in this pass.
        kept: for a pass over trees, once judged: per row, the fed columns of context and accepted path, whose ids end
            `read`.
        counts: per row, how many of the F columns were fed, those at the right edge; None where all of them were.
    """

    given: torch.Tensor | RowTensors
    output: Any
    fed: int
    read: Sequence[list[int]] = field(default_factory=list)
    kept: list[list[int]] | None = None
    counts: list[int] | None = None

    @cached_property
    def logits(self) -> torch.Tensor:
        """`[B, K + 1, V]` on the chain's device, float32 or wider: row i predicts the token after the context and the
        first i draft tokens. Entries beyond a row's draft length mean nothing."""
        return self.given.rectangle() if isinstance(self.given, RowTensors) else self.given

    def fed_of(self, row: int) -> int:
        """Columns that were fed for a row."""
        return self.fed if self.counts is None else self.counts[row]

    @property
    def columns(self) -> int:
        """Columns that were computed for a row, on average and rounded up."""
        return self.fed if self.counts is None else -(-sum(self.counts) // max(1, len(self.counts)))

    @property
    def total(self) -> int:
        """Columns that were computed, all rows together."""
        return self.fed * len(self.read) if self.counts is None else sum(self.counts)
