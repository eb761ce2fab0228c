# SPDX-License-Identifier: Apache-2.0
"""The per-token extras of `return_dict_in_generate`: scores, logits, hidden states and attentions.

Plain generation gets them for free, one step at a time. Here one pass covers several tokens of rows that advance at
different speeds, so each token's share is cut out when it is emitted and put together when the step is complete.
A row that has already finished has no such values; its places hold zeros.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from transformers import GenerationConfig

from ..host.plain_cache import PlainCache
from ..host.runner import ModelRunner
from ..levels.emission import Emission

Layers = tuple[torch.Tensor, ...]


@dataclass(frozen=True)
class Wanted:
    """Which extras the caller asked for."""

    scores: bool = False
    logits: bool = False
    hidden_states: bool = False
    attentions: bool = False

    @classmethod
    def of(cls, config: GenerationConfig) -> Wanted:
        """By the names of `output_*`; nothing where only ids are returned."""
        if not config.return_dict_in_generate:
            return cls()
        return cls(**{field.name: bool(getattr(config, f"output_{field.name}")) for field in fields(cls)})

    @property
    def any(self) -> bool:
        return self.scores or self.logits or self.hidden_states or self.attentions


class Recorder:
    """Collects extras per row as tokens are emitted, and hands them out per step.

    Args:
        wanted: what to collect; batch: number of rows; prompt: prompt columns that plain generation's first step feeds.
        cache: how plain generation's cache would show itself; without one, every step covers the whole text.
        runner: the target's, whose cache says which layers attend to something else than the text; None for none.
    """

    def __init__(
        self, wanted: Wanted, batch: int, prompt: int, cache: PlainCache | None, runner: ModelRunner | None = None
    ) -> None:
        self._runner = runner
        self._elsewhere: set[int] = set()
        self.wanted = wanted
        self.prompt = prompt
        self.cache = cache
        self.scores: tuple[torch.Tensor, ...] = ()
        self.logits: tuple[torch.Tensor, ...] = ()
        self.hidden_states: tuple[Layers, ...] = ()
        self.attentions: tuple[Layers, ...] = ()
        self.cross_attentions: tuple[Layers, ...] = ()
        self._queued_scores: list[list[torch.Tensor]] = [[] for _ in range(batch)]
        self._queued_logits: list[list[torch.Tensor]] = [[] for _ in range(batch)]
        self._queued_hidden: list[list[Layers]] = [[] for _ in range(batch)]
        self._queued_attentions: list[list[Layers]] = [[] for _ in range(batch)]
        self._queued_crossed: list[list[Layers]] = [[] for _ in range(batch)]
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
        if self.wanted.attentions:
            self._elsewhere |= self._not_of_text(output.attentions, emission.passed.fed)
        for b, tokens in enumerate(emission.tokens):
            read = len(emission.passed.read[b])  # with drafts, and with what a row was filled up with
            for j in range(len(tokens)):
                if self.wanted.scores:
                    self._queued_scores[b].append(emission.scores[b, j])
                if self.wanted.logits:
                    self._queued_logits[b].append(emission.logits[b, j])
                length = lengths[b] + j
                width = length if self.cache is None else self.prompt if first and j == 0 else 1
                # Fed columns whose outputs belong to this token: the one it was predicted from, and those before it.
                end = emission.passed.fed - (read - length)
                start = max(0, end - min(width, length))
                if self.wanted.hidden_states:
                    of_row = zip(output.hidden_states, self._axes, strict=True)
                    cut = tuple(layer.select(axis, b).narrow(axis, start, end - start) for layer, axis in of_row)
                    self._queued_hidden[b].append(cut)
                if self.wanted.attentions:
                    maps = [layer[b, :, start:end] for layer in output.attentions]
                    self._queued_attentions[b].append(self._shown(maps, b, read, length))
                    crossed = getattr(output, "cross_attentions", None)
                    if crossed is not None:  # some decoders hand out none of their layers': plain keeps an empty step
                        self._queued_crossed[b].append(tuple(layer[b, :, start:end] for layer in crossed))
                self._emitted[b] += 1

    def shown(self) -> dict[str, Any]:
        """What an output object is given under these names, None for what was not asked for."""
        wanted, all_of = vars(self.wanted), vars(self)
        return {name: all_of[name] if wanted[name] else None for name in wanted}

    def crossed(self) -> tuple[Layers, ...] | None:
        """Attentions to an encoder's outputs, likewise."""
        return self.cross_attentions if self.wanted.attentions else None

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
            if any(self._queued_crossed):
                self.cross_attentions += (_stack_layers(self._queued_crossed),)

    def drop(self, row: int) -> None:
        """The row has finished: whatever was queued for later steps does not count."""
        self._queued_scores[row].clear()
        self._queued_logits[row].clear()
        self._queued_hidden[row].clear()
        self._queued_attentions[row].clear()
        self._queued_crossed[row].clear()

    def _not_of_text(self, maps: Layers, fed: int) -> set[int]:
        """Places of the maps of layers that attend to pictures, as Llama 3.2 Vision has some."""
        if self.cache is None:
            return {place for place, whole in enumerate(maps) if whole.shape[-1] != fed}
        if self._runner is None or len(maps) != len(self._runner.cache.layers):
            return set()
        return set(self._runner.cache.apart)

    def _shown(self, maps: list[torch.Tensor], row: int, read: int, length: int) -> Layers:
        """Of attention maps `[heads, q, S]`, whose last columns are the `read` tokens of a row, those of its first
        `length`, or what plain generation's cache would show of them."""
        found = []
        for i, whole in enumerate(maps):
            if i in self._elsewhere:
                found.append(whole)
                continue
            shown = None if self.cache is None else self.cache.step(self._emitted[row], i, len(maps))
            width, offset = shown or (length, 0)
            first = whole.shape[-1] - read
            seen = whole[..., first + offset : first + min(length, offset + width)]
            found.append(torch.nn.functional.pad(seen, (0, width - seen.shape[-1])))
        return tuple(found)


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
