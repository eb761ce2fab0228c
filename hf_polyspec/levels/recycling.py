# SPDX-License-Identifier: Apache-2.0
"""What the level above said after guesses that it then rejected, as a pointer beside a head.

A pass computes a law after every token that was drafted, those behind a rejected one included. Such a law belongs to a
text that was not to be, but the drafts to come often run through the same few tokens again, one place on or with one
word exchanged, and the law comes from a model that knows better than the head. Token recycling (Luo et al. 2024, arXiv
2408.08696) keeps what followed each id; here it is what followed the last few, and the latest counts most.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import torch

from ..exactness.largest import largest
from .pointers import Place, Suggestion, TailPointer

WEIGHTS = (0.35, 0.6, 0.75)
"""Weights of what was said after the last 1, 2 and 3 ids in the last round.

What makes the target's own text likeliest was estimated with the head that ships, over 18 answers: 0.32, 0.71 and 0.5
to 1 where text is greedy, 0.31, 0.57 and 0.9 at temperature 1."""

HALVED = 3
"""Rounds after which they count half: after 3 to 8 rounds 0.08, 0.24 and 0.4 to 0.7 of greedy text were estimated."""

KEPT = 12
"""Rounds that are remembered."""

LIKELIEST = 8
"""Ids of a law that are kept where text is sampled."""

Said = tuple[Sequence[int], Sequence[float]]
"""The likeliest ids of a law, and their probabilities among themselves."""


class RecyclePointer(TailPointer):
    """The pointer to what the level above said after the last few ids of one row, in a round of late."""

    def __init__(self) -> None:
        super().__init__(len(WEIGHTS))
        self._round = 0
        self._latest: dict[Place, tuple[int, Said]] = {}  # the last round in which it was known, and what was said then
        self._known: deque[list[Place]] = deque(maxlen=KEPT + 1)  # in each of the last rounds

    def learn(self, said: dict[Place, Said]) -> None:
        """Take in a round.

        Args:
            said: by the last ids before it, as many as `WEIGHTS` has or fewer where a text has no more.
        """
        self._round += 1
        known = {tail[-length:]: law for tail, law in said.items() for length in range(1, len(tail) + 1)}
        for tail, law in known.items():
            self._latest[tail] = self._round, law
        self._known.append(list(known))
        if len(self._known) > KEPT:
            for tail in self._known.popleft():
                if tail in self._latest and self._latest[tail][0] <= self._round - KEPT:
                    del self._latest[tail]

    def copied(self) -> RecyclePointer:
        """Another one that knows as much."""
        other = RecyclePointer()
        other._round, other._latest, other._known = self._round, self._latest.copy(), self._known.copy()
        return other

    def suggestion(self, place: Place) -> Suggestion | None:
        for length in range(len(place), 0, -1):
            found = self._latest.get(place[-length:])
            if found is not None:
                age, said = self._round - found[0], found[1]
                return WEIGHTS[length - 1] * 0.5 ** (age / HALVED), *said
        return None


def said_after(laws: torch.Tensor, sampled: Sequence[bool]) -> list[Said]:
    """What is kept of some laws; one host synchronisation.

    Args:
        laws: `[n, V]` logits; sampled: of each, whether text is drawn from it, or is its likeliest id.
    """
    if not any(sampled):
        return [([token], [1.0]) for token in largest(laws).tolist()]
    values, ids = laws.topk(min(LIKELIEST, laws.shape[1]), dim=-1)
    # float64 holds every id
    packed = torch.cat([ids.double(), values.double().softmax(-1)], dim=1).tolist()
    return [
        ([int(token) for token in row[: ids.shape[1]]], row[ids.shape[1] :]) if drawn else ([int(row[0])], [1.0])
        for row, drawn in zip(packed, sampled, strict=True)
    ]
