# SPDX-License-Identifier: Apache-2.0
"""What a pass is fed of which nothing but the likeliest ids is asked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .cache import RollbackCache
from .moments import Moment
from .ragged_cache import RaggedCache
from .rooms import Rooms
from .span import Span

Shape = tuple[int, int, int, int]


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

    def rooms(self, layers: int, shape: Shape, like: torch.Tensor, moment: Moment) -> Rooms | None:
        """The buffers of so many layers, None where they have no place for new keys of a shape and like a tensor."""
        return self.cache.rooms_from(self.held, layers, shape, like, moment)

    def hold(self) -> None:
        """The columns were written."""
        self.cache.hold(self.held + len(self.ids))


@dataclass(frozen=True, slots=True)
class RowsApart:
    """New columns of rows that each have a region of the cache, which has room for them.

    Attributes:
        ids: F of them, one row's behind the other's; positions: `[F]`.
        cache: the rows'; spans: of each that is read.
    """

    ids: Sequence[int]
    positions: Sequence[int]
    cache: RaggedCache
    spans: Sequence[Span]

    def rooms(self, layers: int, shape: Shape, like: torch.Tensor, moment: Moment) -> Rooms | None:
        """As of one row."""
        found = self.cache.rooms_of_regions(layers)
        return found if found is not None and found.take(shape, like) else None

    def hold(self) -> None:
        """What a row's region holds is known to whoever reads it."""


Fed = OneRow | RowsApart
