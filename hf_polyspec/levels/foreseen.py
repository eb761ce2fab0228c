# SPDX-License-Identifier: Apache-2.0
"""What the level above foresaw of the prompt it was given, as a pointer beside a head.

While it reads a prompt, the level above computes a law at every place, and its final states are all there. Where the id
that comes next in the prompt is the one that it holds likeliest, it is no news to it: an answer that comes to the same
few ids goes on with it more often than a copy of as many ids is right by itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch

from ..eagle.configuration import LAST_HIDDEN_STATE
from ..eagle.features import select_features
from ..exactness.passes import Pass
from .draft_vocabulary import WorkingVocabulary
from .pointers import Place, Suggestion, TailPointer

WEIGHTS = (0.06, 0.15, 0.3)
"""Weights of what was foreseen after the last 1, 2 and 3 ids.

Greedy chains of the head that ships over 60 questions of Spec-Bench took 2438 passes without it, 2414 with these, 2417
with 0.1, 0.25 and 0.45, 2442 with 0.2, 0.45 and 0.65. Where what is held likeliest is suggested whether or not it comes
next in the prompt, they take 2474."""

_CHUNK = 1024
"""Places whose laws are looked at together."""

_MOST = 8192
"""Places after which no more states are kept: a head that is never asked is never told."""


class ForeseenPointer(TailPointer):
    """The pointer to what the level above foresaw in the prompt of one row."""

    def __init__(self) -> None:
        super().__init__(len(WEIGHTS))
        self._known: dict[Place, int] = {}

    def learn(self, ids: Sequence[int], likeliest: Sequence[int]) -> None:
        """Take in a prompt.

        Args:
            ids: its ids, without padding.
            likeliest: what the level above held likeliest after each of them; nothing where that is not known.
        """
        for place, (token, foreseen) in enumerate(zip(ids[1:], likeliest, strict=False), start=1):
            if token == foreseen:
                for length in range(1, min(place, len(WEIGHTS)) + 1):
                    self._known[tuple(ids[place - length : place])] = token

    def copied(self) -> ForeseenPointer:
        """Another one that knows as much."""
        other = ForeseenPointer()
        other._known = self._known.copy()
        return other

    def suggestion(self, place: Place) -> Suggestion | None:
        for length in range(len(place), 0, -1):
            token = self._known.get(place[-length:])
            if token is not None:
                return WEIGHTS[length - 1], (token,), (1.0,)
        return None


@dataclass
class _Kept:
    """Of one row: what passes had read, how many columns each fed, and their final states `[F, H]`."""

    passes: list[tuple[list[int], int, torch.Tensor]] = field(default_factory=list)
    places: int = 0
    told: bool = False


class PromptStates:
    """The final states of the level above at the places of the prompts, kept until the first draft.

    What is read after it are drafts, of which there are laws already.
    """

    def __init__(self, rows: int) -> None:
        self._rows = [_Kept() for _ in range(rows)]

    def keep(self, passed: Pass) -> None:
        """Keep those of a pass over prompts, or parts of them."""
        waiting = [(b, row) for b, row in enumerate(self._rows) if not row.told and passed.fed_of(b)]
        if passed.kept is not None or not any(row.places < _MOST for _, row in waiting):
            return
        final = select_features(passed.output.hidden_states, [LAST_HIDDEN_STATE])  # [B, F, H]
        for b, row in waiting:
            row.passes.append((passed.read[b], passed.fed_of(b), final[b]))
            row.places += passed.fed_of(b)

    def keep_rows(self, rows: Sequence[int]) -> None:
        """Go on with some of the rows, in their new order."""
        self._rows = [replace(self._rows[r], passes=list(self._rows[r].passes)) for r in rows]

    def add_rows(self, count: int) -> None:
        """So many rows join, whose prompts have yet to be read."""
        self._rows = [*self._rows, *(_Kept() for _ in range(count))]

    def tell(self, pointers: Sequence[ForeseenPointer], working: WorkingVocabulary, padding: Sequence[int]) -> None:
        """Have each row's pointer learn what was kept, if anything was, and keep nothing more of it.

        Args:
            pointers: of each row; working: scores what the level above held likeliest; padding: leading positions of
                each row that are not text.
        """
        for row, pointer, empty in zip(self._rows, pointers, padding, strict=True):
            if not row.passes:
                continue
            passes, row.passes, row.told = row.passes, [], True
            text: list[int] = []
            likeliest: list[int] = []
            for read, fed, final in passes:
                first = max(len(read) - fed, empty)
                if first < len(read):
                    text += read[first:]
                    for piece in torch.split(final[first - len(read) :], _CHUNK):
                        found = working.likeliest(piece)
                        likeliest += [] if found is None else found.tolist()
            pointer.learn(text, likeliest)
