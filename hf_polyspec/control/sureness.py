# SPDX-License-Identifier: Apache-2.0
"""How often a drafter that tells its chances was right, by how sure it said it was.

A drafter's chances follow from how texts usually repeat themselves; one that is sampled at a high temperature repeats
itself less. What is offered and cut off is seen to be right or wrong as well, as soon as the text has come there, and
costs nothing: only the first token of each row's draft is looked at, which follows on what the text already is.
"""

from __future__ import annotations

from collections.abc import Sequence

from ..exactness.context import Context

BINS = 8
TRUST = 4.0
"""Tokens that a drafter's own word stands for."""
CARRIED = 16.0
"""Tokens that those of other texts stand for, which were told the same chance."""
KEPT = 0.98
"""What a token leaves of the weight of those before it that were told the same chance."""


class Sureness:
    """Lowers the chances of one drafter where fewer of its tokens come true than it says."""

    def __init__(self) -> None:
        self._seen = [0.0] * BINS
        self._right = [0.0] * BINS
        self._waiting: dict[int, tuple[int, int, float]] = {}

    def carried(self) -> Sureness:
        """What was seen of other texts, of which a part stands for what is not yet seen of these."""
        found = Sureness()
        for place, seen in enumerate(self._seen):
            share = min(1.0, CARRIED / seen) if seen else 0.0
            found._seen[place], found._right[place] = share * seen, share * self._right[place]
        return found

    def offered(self, context: Context, tokens: Sequence[Sequence[int]], chances: Sequence[Sequence[float]]) -> None:
        """Drafts of rows, and the chance that each is right up to each of its tokens, before anything is cut."""
        rows = zip(context.places, context.ids, tokens, chances, strict=True)
        self._waiting = {place: (len(ids), own[0], told[0]) for place, ids, own, told in rows if own and told}

    def came(self, context: Context) -> None:
        """The rows are so far now."""
        if not self._waiting:
            return
        for place, ids in zip(context.places, context.ids, strict=True):
            at, token, chance = self._waiting.get(place, (len(ids), 0, 0.0))
            if at < len(ids):
                self._add(chance, ids[at] == token)
        self._waiting = {}

    def corrected(self, chances: Sequence[float]) -> list[float]:
        """The chances that a draft is right up to each of its tokens, by what such words were worth."""
        found, before, reached = [], 1.0, 1.0
        for chance in chances:
            if not before:
                break
            reached *= self._worth(min(1.0, chance / before))
            before = chance
            found.append(reached)
        return found

    def _add(self, chance: float, right: bool) -> None:
        place = _bin(chance)
        self._seen[place] = KEPT * self._seen[place] + 1
        self._right[place] = KEPT * self._right[place] + right

    def _worth(self, chance: float) -> float:
        place = _bin(chance)
        return min(chance, (self._right[place] + TRUST * chance) / (self._seen[place] + TRUST))


def _bin(chance: float) -> int:
    return min(BINS - 1, int(BINS * chance))
