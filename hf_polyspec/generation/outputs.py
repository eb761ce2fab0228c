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

from ..levels.verifier import Emission

Layers = tuple[torch.Tensor, ...]


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
        wanted: what to collect; batch: number of rows; prompt: prompt columns not in the caller's cache.
        windows: per layer, how many columns plain generation's cache keeps after the prompt, None for all; without a
            cache (None instead of a list), every step covers the whole text.
    """

    def __init__(self, wanted: Wanted, batch: int, prompt: int, windows: Sequence[int | None] | None = ()) -> None:
        self.wanted = wanted
        self.prompt = prompt
        self.windows = windows
        self.scores: tuple[torch.Tensor, ...] = ()
        self.logits: tuple[torch.Tensor, ...] = ()
        self.hidden_states: tuple[Layers, ...] = ()
        self.attentions: tuple[Layers, ...] = ()
        self._queued_scores: list[list[torch.Tensor]] = [[] for _ in range(batch)]
        self._queued_logits: list[list[torch.Tensor]] = [[] for _ in range(batch)]
        self._queued_hidden: list[list[Layers]] = [[] for _ in range(batch)]
        self._queued_attentions: list[list[Layers]] = [[] for _ in range(batch)]

    def emitted(self, emission: Emission, lengths: list[int], first: bool) -> None:
        """A target round is over.

        Args:
            emission: what it emitted.
            lengths: ids of each row before the round.
            first: whether this was the pass over the prompt.
        """
        for b, tokens in enumerate(emission.tokens):
            for j in range(len(tokens)):
                if self.wanted.scores:
                    self._queued_scores[b].append(emission.scores[b, j])
                if self.wanted.logits:
                    self._queued_logits[b].append(emission.logits[b, j])
                prompt = first and j == 0
                length = lengths[b] + j
                width = length if self.windows is None else self.prompt if prompt else 1
                span = self._columns(emission, b, j, width)
                if self.wanted.hidden_states:
                    layers = emission.passed.output.hidden_states
                    self._queued_hidden[b].append(tuple(layer[b, span] for layer in layers))
                if self.wanted.attentions:
                    self._queued_attentions[b].append(self._attention(emission, b, span, length, prompt))

    def commit(self) -> None:
        """One more step is final for all rows."""
        if self.wanted.scores:
            self.scores += (_stack(self._queued_scores),)
        if self.wanted.logits:
            self.logits += (_stack(self._queued_logits),)
        if self.wanted.hidden_states:
            self.hidden_states += (_stack_layers(self._queued_hidden),)
        if self.wanted.attentions:
            self.attentions += (_stack_layers(self._queued_attentions),)

    def drop(self, row: int) -> None:
        """The row has finished: whatever was queued for later steps does not count."""
        self._queued_scores[row].clear()
        self._queued_logits[row].clear()
        self._queued_hidden[row].clear()
        self._queued_attentions[row].clear()

    def _columns(self, emission: Emission, row: int, token: int, width: int) -> slice:
        """Fed columns whose outputs belong to the row's emitted token: the one it was predicted from, and `width - 1`
        before it."""
        end = emission.passed.fed - emission.drafted[row] + token
        return slice(max(0, end - width), end)

    def _attention(self, emission: Emission, row: int, span: slice, length: int, prompt: bool) -> Layers:
        """Attention maps `[heads, q, kv]` of the span's columns, over the row's own `length` columns, or over as many
        of them as plain generation's cache would still hold."""
        layers = emission.passed.output.attentions
        offset = layers[0].shape[-1] - emission.passed.fed + span.stop
        widths = [length] * len(layers)
        for i, window in enumerate(self.windows or ()):
            if window is not None and not prompt:
                widths[i] = min(length, window)
        return tuple(layer[row, :, span, offset - width : offset] for layer, width in zip(layers, widths, strict=True))


def _stack(queued: list[list[torch.Tensor]]) -> torch.Tensor:
    """The oldest queued entry of each row, `[B, ...]`; zeros for rows without one."""
    rows = [row.pop(0) if row else None for row in queued]
    like = next(row for row in rows if row is not None)
    return torch.stack([torch.zeros_like(like) if row is None else row for row in rows])


def _stack_layers(queued: list[list[Layers]]) -> Layers:
    rows = [row.pop(0) if row else None for row in queued]
    like = next(row for row in rows if row is not None)
    return tuple(
        torch.stack([torch.zeros_like(like[i]) if row is None else row[i] for row in rows]) for i in range(len(like))
    )
