# SPDX-License-Identifier: Apache-2.0
"""What a middle has collected for the level above it, row by row."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

import torch
from torch.nn.functional import one_hot

from ..exactness.proposal import Proposal


@dataclass
class Block:
    """Tokens with the law each was drawn from (law 1).

    Attributes:
        tokens, origins: per row, as in `Proposal`.
        unchecked: per row, how many of its last tokens were passed on as the level below offered them.
        closed: per row, whether nothing is to come behind.
        laws: per row, pieces `[k, V]` of the laws its first tokens were drawn from; nobody drew the unchecked ones.
    """

    tokens: list[list[int]]
    origins: list[list[int]]
    unchecked: list[int]
    closed: list[bool]
    laws: list[list[torch.Tensor]] = field(default_factory=list)

    @classmethod
    def of(cls, rows: int) -> Block:
        """An empty one."""
        nothing = [0] * rows, [False] * rows
        return cls([[] for _ in range(rows)], [[] for _ in range(rows)], *nothing, [[] for _ in range(rows)])

    def add(self, row: int, tokens: list[int], origins: list[int], law: torch.Tensor | None) -> None:
        """Tokens that the middle emitted, with its law `[k, V]` at each; None where nobody tests against it."""
        self.tokens[row].extend(tokens)
        self.origins[row].extend(origins)
        if law is not None and tokens:
            self.laws[row].append(law)

    def close(self, row: int, tokens: list[int], origins: list[int]) -> None:
        """A draft that nobody drew, or nothing, ends the row's block: it goes up as it is."""
        self.tokens[row].extend(tokens)
        self.origins[row].extend(origins)
        self.unchecked[row], self.closed[row] = len(tokens), True

    def rooms(self, limits: Sequence[int], most: int | None, eos: Collection[int]) -> list[int]:
        """Per row, how many tokens more it may take; 0 once it is complete.

        Args:
            limits: tokens of each row at most; most: tokens after which a row is complete, None for its limit.
            eos: ids that end a text.
        """
        rows = zip(self.tokens, self.closed, limits, strict=True)
        return [
            0 if closed else _room(held, limit, limit if most is None else most, eos) for held, closed, limit in rows
        ]

    def proposal(self) -> Proposal:
        """The block as it is offered."""
        return Proposal(self.tokens, self._stacked(), self.origins)

    def _stacked(self) -> torch.Tensor | None:
        """`[B, K, V]` from the rows' pieces, shorter rows filled with zeros; None where no token was drawn."""
        like = next((piece for pieces in self.laws for piece in pieces), None)
        if like is None:
            return None
        rows = [self._of_row(row, like) for row in range(len(self.tokens))]
        if len(rows) == 1:
            return rows[0].unsqueeze(0)
        stacked = like.new_zeros(len(rows), max(row.shape[0] for row in rows), like.shape[1])
        for place, row in enumerate(rows):
            stacked[place, : row.shape[0]] = row
        return stacked

    def _of_row(self, row: int, like: torch.Tensor) -> torch.Tensor:
        """`[k, V]`: the laws of what was drawn, and all the probability on each token that was not."""
        pieces = list(self.laws[row])
        if self.unchecked[row]:
            tokens = torch.tensor(self.tokens[row][-self.unchecked[row] :], device=like.device)
            pieces.append(one_hot(tokens, like.shape[1]).to(like.dtype))
        return torch.cat(pieces) if pieces else like.new_zeros(0, like.shape[1])


def _room(held: Sequence[int], limit: int, most: int, eos: Collection[int]) -> int:
    return 0 if len(held) >= min(most, limit) or (held and held[-1] in eos) else limit - len(held)
