# SPDX-License-Identifier: Apache-2.0
"""What a level is asked to continue: the token ids of each row, and what the prompt brought along."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

EMBEDDED = -1
"""Stands in a row's ids for a prompt position whose id nobody gave: an embedding, or part of a caller's cache."""


@dataclass(frozen=True)
class Prompt:
    """What the caller said about the prompt besides its ids; shared by all levels of one call.

    Attributes:
        width: number of prompt columns P, left padding and positions without ids included.
        mask: `[B, P]` of 0/1, or None when every column is real.
        positions: `[B, P]` position ids.
        embeds: `[B, E, H]` embeddings of the first E columns, or None.
        hidden: number of leading columns without ids.
        rows: places that the rows had in the batch as the call began, None while all are there.
        starts: per row, how many of its ids are prompt, where prompts have lengths of their own; None: `width`.
    """

    width: int
    mask: torch.Tensor | None
    positions: torch.Tensor
    embeds: torch.Tensor | None = None
    hidden: int = 0
    rows: tuple[int, ...] | None = None
    starts: tuple[int, ...] | None = None

    @classmethod
    def apart(cls, starts: Sequence[int], places: Sequence[int]) -> Prompt:
        """Prompts without padding, each of its own length; rows may join.

        Args:
            starts: ids of each; places: what each row is called, whoever runs beside it.
        """
        # No column is the prompt's: positions are counted from the first id on.
        positions = torch.full((len(starts), 1), -1, dtype=torch.long)
        return cls(0, None, positions, rows=tuple(places), starts=tuple(starts))

    @cached_property
    def following(self) -> list[int]:
        """Per row, the position id of the first token after the prompt; read once, since reading may synchronise."""
        return [int(position) + 1 for position in self.positions[:, -1].tolist()]

    def select(self, rows: list[int]) -> Prompt:
        """The same prompt with only the given rows."""
        return Prompt(
            self.width,
            None if self.mask is None else self.mask[rows],
            self.positions[rows],
            None if self.embeds is None else self.embeds[rows],
            self.hidden,
            tuple(rows if self.rows is None else (self.rows[row] for row in rows)),
            None if self.starts is None else tuple(self.starts[row] for row in rows),
        )


@dataclass(frozen=True)
class Context:
    """The rows to continue. Rows of one batch may have different lengths once generation has begun.

    Attributes:
        ids: a list of token ids per row, the prompt's left padding included (its mask says which those are).
        prompt: what the caller gave.
    """

    ids: list[list[int]]
    prompt: Prompt

    @property
    def batch(self) -> int:
        return len(self.ids)

    def extended(self, tokens: list[list[int]]) -> Context:
        """A new context with `tokens[b]` appended to row b; this one stays as it is."""
        return Context([row + more for row, more in zip(self.ids, tokens, strict=True)], self.prompt)

    def select(self, rows: list[int]) -> Context:
        """Only the given rows, in this order."""
        if rows == list(range(self.batch)):
            return self
        return Context([self.ids[row] for row in rows], self.prompt.select(rows))

    def joined(self, more: Context) -> Context:
        """These rows and others behind them, all of them with prompts of their own length (`Prompt.apart`)."""
        prompts = self.prompt, more.prompt
        starts = [start for prompt in prompts for start in prompt.starts or ()]
        return Context([*self.ids, *more.ids], Prompt.apart(starts, [*self.places, *more.places]))

    @property
    def places(self) -> Sequence[int]:
        """Where each row stood in the batch as the call began."""
        return range(self.batch) if self.prompt.rows is None else self.prompt.rows

    def steps(self) -> list[int]:
        """Per row, how many tokens follow the prompt: the step at which plain generation draws the next one."""
        starts = self.prompt.starts or [self.prompt.width] * self.batch
        return [len(row) - start for row, start in zip(self.ids, starts, strict=True)]

    def visible(self, row: int) -> list[int]:
        """Row's ids as logits processors and id-based drafters may see them: without positions that have none."""
        ids = self.ids[row]
        return ids[self.prompt.hidden :] if self.prompt.hidden else ids


def common_prefix(left: list[int], right: list[int]) -> int:
    """Number of leading ids the two lists share.

    Lists almost always agree up to near the end, so equality of slices (one C loop) is tried first and then bisected.
    """
    high = min(len(left), len(right))
    # A copy of a list touches every number in it, so none is made of the shorter one.
    if (left if len(left) == high else left[:high]) == (right if len(right) == high else right[:high]):
        return high
    low = 0
    while low + 1 < high:
        middle = (low + high) // 2
        if left[low:middle] == right[low:middle]:
            low = middle
        else:
            high = middle
    return low
