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
        base: first column of its region in the cache; seen: columns read before the pass.
        sees: `[count, count]` boolean, which of the new columns each of them sees, for trees; None: those before it.
        places: `[count]`, the positions in the row's text of the new columns, for trees; None: counting on from `seen`.
        dropped: of the columns read before, how many the region no longer holds, the oldest.
    """

    first: int
    count: int
    base: int
    seen: int
    sees: torch.Tensor | None = None
    places: torch.Tensor | None = None
    dropped: int = 0

    @property
    def end(self) -> int:
        """Columns of its region after the pass."""
        return self.seen + self.count - self.dropped

    @property
    def written(self) -> range:
        """Columns of the cache that the new ones go to."""
        return range(self.base + self.end - self.count, self.base + self.end)

    def mask(self, rule: Rule) -> torch.Tensor | None:
        """`[1, 1, count, end]` boolean; None for what attention does without: causal from the beginning, or all columns
        for a single one.

        Raises:
            ValueError: the rule shows a column that is no longer held.
        """
        queries = torch.arange(self.seen, self.seen + self.count) if self.places is None else self.places
        keys = torch.cat([torch.arange(max(0, self.dropped - 1), self.seen), queries])
        at = torch.zeros(1, 1, 1, 1, dtype=torch.long)
        seen = rule(at, at, queries[None, None, :, None], keys[None, None, None, :])
        seen = seen.expand(1, 1, self.count, len(keys))
        if self.dropped:
            if bool(seen[..., 0].any()):
                raise ValueError("a layer looks further back than its cache holds")
            seen = seen[..., 1:]
        held = self.end - self.count
        if self.sees is not None:
            seen = seen.clone()
            seen[..., held:] &= self.sees
        whole = torch.ones_like(seen) if self.count == 1 else torch.ones_like(seen).tril(held)
        return None if (self.count == 1 or not held) and bool(seen.eq(whole).all()) else seen
