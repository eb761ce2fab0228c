# SPDX-License-Identifier: Apache-2.0
"""The new columns of one row in a pass over several rows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

Rule = Callable[..., torch.Tensor]
"""Which key a query sees: called with indices of row, head, query and key, that broadcast; boolean."""


@dataclass(frozen=True)
class Span:
    """The new columns of one row in a pass.

    Attributes:
        first: of its columns in the pass; count: how many there are.
        base: first column of its region in the cache; seen: columns held there before the pass.
        sees: `[count, count]` boolean, which of the new columns each of them sees, for trees; None: those before it.
        places: `[count]`, the positions in the row's text of the new columns, for trees; None: counting on from `seen`.
    """

    first: int
    count: int
    base: int
    seen: int
    sees: torch.Tensor | None = None
    places: torch.Tensor | None = None

    @property
    def end(self) -> int:
        """Columns of the row after the pass."""
        return self.seen + self.count

    def mask(self, rule: Rule) -> torch.Tensor | None:
        """`[1, 1, count, seen + count]` boolean; None for what attention does without: causal from the beginning, or
        all columns for a single one."""
        queries = torch.arange(self.seen, self.end) if self.places is None else self.places
        keys = torch.cat([torch.arange(self.seen), queries])
        at = torch.zeros(1, 1, 1, 1, dtype=torch.long)
        seen = rule(at, at, queries[None, None, :, None], keys[None, None, None, :])
        seen = seen.expand(1, 1, self.count, self.end)
        if self.sees is not None:
            seen = seen.clone()
            seen[..., self.seen :] &= self.sees
        whole = torch.ones_like(seen) if self.count == 1 else torch.ones_like(seen).tril(self.seen)
        return None if (self.count == 1 or not self.seen) and bool(seen.eq(whole).all()) else seen
