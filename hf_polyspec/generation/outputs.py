# SPDX-License-Identifier: Apache-2.0
"""The per-token extras of `return_dict_in_generate`: scores, logits, hidden states and attentions.

Plain generation gets them for free, one step at a time. Here one pass covers several tokens of rows that advance at
different speeds, so each token's share is cut out when it is emitted and put together when the step is complete.
A row that has already finished has no such values; its places hold zeros.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..host.plain_cache import PlainCache
from ..levels.verifier import Emission

Layers = tuple[torch.Tensor, ...]
Span = slice | torch.Tensor
"""Places along a dimension: a slice where they follow one another."""


@dataclass(frozen=True)
class Wanted:
    """Which extras the caller asked for."""

    scores: bool = False
    logits: bool = False
    hidden_states: bool = False
    attentions: bool = False

    @property
    def any(self) -> bool:
        return self.scores or self.logits or self.hidden_states or self.attentions


class Recorder:
    """Collects extras per row as tokens are emitted, and hands them out per step.

    Args:
        wanted: what to collect; batch: number of rows; prompt: prompt columns that plain generation's first step feeds.
        cache: how plain generation's cache would show itself; without one, every step covers the whole text.
    """

    def __init__(self, wanted: Wanted, batch: int, prompt: int, cache: PlainCache | None) -> None:
        self.wanted = wanted
        self.prompt = prompt
        self.cache = cache
        self.scores: tuple[torch.Tensor, ...] = ()
        self.logits: tuple[torch.Tensor, ...] = ()
        self.hidden_states: tuple[Layers, ...] = ()
        self.attentions: tuple[Layers, ...] = ()
        self._queued_scores: list[list[torch.Tensor]] = [[] for _ in range(batch)]
        self._queued_logits: list[list[torch.Tensor]] = [[] for _ in range(batch)]
        self._queued_hidden: list[list[Layers]] = [[] for _ in range(batch)]
        self._queued_attentions: list[list[Layers]] = [[] for _ in range(batch)]
        self._emitted = [0] * batch
        self._axes: list[int] = []  # where hidden states have their rows, by layer

    def emitted(self, emission: Emission, lengths: list[int], first: bool) -> None:
        """A target round is over.

        Args:
            emission: what it emitted.
            lengths: ids of each row before the round.
            first: whether this was the pass over the prompt.

        Raises:
            ValueError: hidden states have a shape in which rows and columns are not to be found.
        """
        output = emission.passed.output
        if self.wanted.hidden_states:
            self._axes = _row_axes(output.hidden_states, len(lengths), emission.passed.fed, self._axes)
        for b, tokens in enumerate(emission.tokens):
            columns = _Columns(emission, b)
            for j in range(len(tokens)):
                if self.wanted.scores:
                    self._queued_scores[b].append(emission.scores[b, j])
                if self.wanted.logits:
                    self._queued_logits[b].append(emission.logits[b, j])
                length = lengths[b] + j
                width = length if self.cache is None else self.prompt if first and j == 0 else 1
                span = columns.span(length, width)
                if self.wanted.hidden_states:
                    layers = zip(output.hidden_states, self._axes, strict=True)
                    self._queued_hidden[b].append(
                        tuple(_cut(layer.select(axis, b), axis, span) for layer, axis in layers)
                    )
                if self.wanted.attentions:
                    self._queued_attentions[b].append(self._attention(output.attentions, b, columns, span, length))
                self._emitted[b] += 1

    def commit(self) -> None:
        """One more step is final for all rows."""
        if self.wanted.scores:
            self.scores += (_stack(self._queued_scores),)
        if self.wanted.logits:
            self.logits += (_stack(self._queued_logits),)
        if self.wanted.hidden_states:
            self.hidden_states += (_stack_layers(self._queued_hidden, self._axes),)
        if self.wanted.attentions:
            self.attentions += (_stack_layers(self._queued_attentions),)

    def drop(self, row: int) -> None:
        """The row has finished: whatever was queued for later steps does not count."""
        self._queued_scores[row].clear()
        self._queued_logits[row].clear()
        self._queued_hidden[row].clear()
        self._queued_attentions[row].clear()

    def _attention(self, layers: Layers, row: int, columns: _Columns, span: Span, length: int) -> Layers:
        """Attention maps `[heads, q, kv]` of the span's columns, over the row's first `length` tokens, or over what
        plain generation's cache would show of them."""
        found = []
        for i, layer in enumerate(layers):
            shown = None if self.cache is None else self.cache.step(self._emitted[row], i)
            width, offset = shown or (length, 0)
            map_of_row = _cut(layer[row], 1, span)
            seen = _cut(map_of_row, 2, columns.seen(offset, min(length, offset + width), layer.shape[-1]))
            found.append(torch.nn.functional.pad(seen, (0, width - seen.shape[2])))
        return tuple(found)


class _Columns:
    """Where a row's tokens stand in what a pass fed and in the keys it saw."""

    def __init__(self, emission: Emission, row: int) -> None:
        passed = emission.passed
        read = len(passed.read[row])
        self.fed = passed.fed
        self.of_fed: Sequence[int] = (
            range(max(0, passed.fed - read), passed.fed) if passed.kept is None else passed.kept[row]
        )
        self.before = read - len(self.of_fed)  # tokens that had been read earlier

    def span(self, length: int, width: int) -> Span:
        """Fed columns whose outputs belong to the token after the first `length`: the one it was predicted from, and
        `width - 1` before it."""
        return _contiguous(self.of_fed[max(0, length - width - self.before) : length - self.before])

    def seen(self, start: int, end: int, keys: int) -> Span:
        """Columns of the keys of the row's tokens from `start` to before `end`; `keys` is their number."""
        past = keys - self.fed
        first = past + self.of_fed[0] - self.before
        old = range(first + start, first + min(end, self.before))
        new = self.of_fed[max(0, start - self.before) : max(0, end - self.before)]
        return _contiguous([*old, *(past + column for column in new)])


def _contiguous(columns: Sequence[int]) -> Span:
    """A slice where columns follow one another, which copies nothing."""
    if columns and columns[-1] - columns[0] == len(columns) - 1:
        return slice(columns[0], columns[-1] + 1)
    return torch.tensor(list(columns), dtype=torch.long)


def _cut(values: torch.Tensor, axis: int, span: Span) -> torch.Tensor:
    if isinstance(span, slice):
        return values.narrow(axis, span.start, span.stop - span.start)
    return values.index_select(axis, span.to(values.device))


def _row_axes(layers: Layers, batch: int, fed: int, known: list[int]) -> list[int]:
    """Which dimension of each layer's hidden states is the batch; the fed columns are the next one.

    Nearly always they are `[B, F, H]`; Gemma 3n's are `[inputs, B, F, H]` but for the last. What fitted before is tried
    first, then the place before the last two.

    Raises:
        ValueError: no two dimensions fit.
    """
    found = []
    for i, layer in enumerate(layers):
        places = [*known[i : i + 1], layer.dim() - 3, *range(layer.dim() - 1)]
        fits = [d for d in places if d >= 0 and tuple(layer.shape[d : d + 2]) == (batch, fed)]
        if not fits:
            raise ValueError(
                f"output_hidden_states: layer {i} hands out states of shape {tuple(layer.shape)}, in which the "
                f"{batch} rows and {fed} columns of the pass are not to be found; leave it out."
            )
        found.append(fits[0])
    return found


def _stack(queued: list[list[torch.Tensor]]) -> torch.Tensor:
    """The oldest queued entry of each row, `[B, ...]`; zeros for rows without one."""
    rows = [row.pop(0) if row else None for row in queued]
    like = next(row for row in rows if row is not None)
    return torch.stack([torch.zeros_like(like) if row is None else row for row in rows])


def _stack_layers(queued: list[list[Layers]], axes: Sequence[int] | None = None) -> Layers:
    """As `_stack`, by layer; rows become the dimension that `axes` says, by default the first."""
    rows = [row.pop(0) if row else None for row in queued]
    like = next(row for row in rows if row is not None)
    return tuple(
        torch.stack([torch.zeros_like(like[i]) if row is None else row[i] for row in rows], axes[i] if axes else 0)
        for i in range(len(like))
    )
