# SPDX-License-Identifier: Apache-2.0
"""A level whose model has another tokenizer than the target: to the levels around it, it speaks the target's ids.

The context is read through its text. What the model says is said of the words that both vocabularies have: its scores
of all others are taken away, so its law is its own, restricted and normalised again by softmax. That is a law like any
other: it is what a drafter draws from and a middle verifies by, and what either hands up (law 1). One token of the
target's is mostly one of the model's; where a proposal holds others, they are read in pieces.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from ..exactness.context import Context, Prompt
from ..exactness.passes import Pass
from ..telemetry.counters import LevelStats
from .runner import ModelRunner
from .vocabularies import Vocabularies, translations


class TranslatedRunner(ModelRunner):
    """A runner with contexts, drafts and logits in the target's ids around one in a model's own.

    Whatever is not said here is the runner's inside.

    Args:
        inner: the runner of the model.
        pair: the target's tokenizer and the model's.
    """

    cuts = False  # a column of the model is no place in the target's ids

    def __init__(self, inner: ModelRunner, pair: Vocabularies) -> None:
        self.inner = inner
        self.pair = pair
        self.steps = inner.steps
        self.own_rows = inner.own_rows
        self.asked = None
        self.lender = None
        self.note = "; ".join(
            filter(None, (inner.note, f"{inner.name} knows {len(pair.mine)} of the target's {pair.rows} ids as words"))
        )
        self._rows_of_text = translations(pair, ())

    def __getattr__(self, name: str) -> Any:
        if name == "inner":
            raise AttributeError(name)
        return getattr(self.inner, name)

    def run(self, context: Context, drafts: list[list[int]], stats: LevelStats, *, columns: int = 0) -> Pass:
        """As `ModelRunner.run`, logits `[B, K + 1, V]` over the target's ids."""
        pieces = [[self.pair.piece(token) for token in draft] for draft in drafts]
        flat = [[i for piece in row for i in piece] for row in pieces]
        self.inner.asked = self.asked
        passed = self.inner.run(self._translated(context), flat, stats)
        logits = self.pair.scores(_after_tokens(passed.logits, pieces))
        return replace(passed, given=logits, read=context.extended(drafts).ids)

    def lacks(self, context: Context) -> list[int]:
        return self.inner.lacks(self._translated(context))

    def reads_alone(self, context: Context) -> bool:
        """Never: what stands in a prompt besides words is not shown to this model."""
        return False

    def can_read(self, context: Context) -> bool:
        return self.inner.can_read(self._translated(context))

    def within(self, context: Context, limits: list[int]) -> list[int]:
        return self.inner.within(self._translated(context), limits)

    def prefill(
        self, context: Context, chunk: int, stats: LevelStats, watch: Callable[[Pass], None] | None = None
    ) -> None:
        """Feed the context in pieces of `chunk` columns, all but the last."""
        whole = self._translated(context)
        for end in range(chunk, max(map(len, whole.ids)), chunk):
            piece = Context([ids[:end] for ids in whole.ids], whole.prompt)
            if self.inner.can_read(piece):
                self.inner.run(piece, [[] for _ in piece.ids], stats)

    def keep_rows(self, rows: list[int]) -> None:
        self.inner.keep_rows(rows)
        if self._rows_of_text:
            self._rows_of_text = [self._rows_of_text[row] for row in rows]

    def add_rows(self, count: int) -> None:
        self.inner.add_rows(count)
        if self._rows_of_text:
            self._rows_of_text += translations(self.pair, range(count))

    def _translated(self, context: Context) -> Context:
        if len(self._rows_of_text) != context.batch:
            self._rows_of_text = translations(self.pair, context.ids)
        ids = [self._rows_of_text[row].of(_words(context, row)) for row in range(context.batch)]
        # Rows begin where their text does: nothing is padded, and positions count from the first id on.
        return Context(ids, Prompt(0, None, torch.full((len(ids), 1), -1, dtype=torch.long)))


def _words(context: Context, row: int) -> list[int]:
    """A row's ids without padding and without positions that have none."""
    prompt, ids = context.prompt, context.ids[row]
    if prompt.mask is None:
        return context.visible(row)
    real = [i for i, kept in zip(ids, prompt.mask[row].tolist(), strict=False) if kept]
    hidden = min(prompt.hidden, int(prompt.mask[row].sum()))
    return real[hidden:] + ids[prompt.width :]


def _after_tokens(logits: torch.Tensor, pieces: list[list[list[int]]]) -> torch.Tensor:
    """Of logits `[B, K' + 1, V]` after every piece those `[B, K + 1, V]` after every token of the target's."""
    if all(len(piece) == 1 for row in pieces for piece in row):
        return logits
    width = 1 + max(len(row) for row in pieces)
    places = torch.zeros(len(pieces), width, dtype=torch.long)
    for b, row in enumerate(pieces):
        read = 0
        for j, piece in enumerate(row, start=1):
            read += len(piece)
            places[b, j:] = read
    return logits.gather(1, places.to(logits.device)[:, :, None].expand(-1, -1, logits.shape[2]))
