# SPDX-License-Identifier: Apache-2.0
"""What a pass is fed of which nothing but the likeliest ids is asked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .cache import RollbackCache
from .ragged_cache import RaggedCache


@dataclass(frozen=True, slots=True)
class OneRow:
    """New columns of a row that is alone.

    Attributes:
        ids: F of them; position: of the first, the others count on from there.
        cache: the row's; held: columns in it, behind which the new ones go.
    """

    ids: Sequence[int]
    position: int
    cache: RollbackCache
    held: int

    @property
    def positions(self) -> Sequence[int]:
        """`[F]`."""
        return range(self.position, self.position + len(self.ids))


@dataclass(frozen=True, slots=True)
class RowsApart:
    """New columns of rows that each have a region of the cache, which has room for them.

    Attributes:
        ids: F of them, one row's behind the other's; positions: `[F]`.
        cache: the rows'.
        spans: per row that is read, the first of its columns here, how many there are, where its region begins, and the
            columns of it that are filled after the pass.
    """

    ids: Sequence[int]
    positions: Sequence[int]
    cache: RaggedCache
    spans: Sequence[tuple[int, int, int, int]]

    @property
    def written(self) -> list[int]:
        """`[F]`, columns of the cache that the new ones go to."""
        return [place for _, count, base, end in self.spans for place in range(base + end - count, base + end)]


Fed = OneRow | RowsApart
