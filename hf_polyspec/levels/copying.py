# SPDX-License-Identifier: Apache-2.0
"""A head's guesses mixed with what the text itself suggests: what followed the last few tokens before.

A head of one layer finds it hard to look a name or a phrase up in its context. What followed the longest suffix that
occurred before is known for nothing, and right the more often the longer that suffix is. So each guess is drawn from

    (1 - w) q + w [x = c],

q being the head's law and c what most often followed: a pointer beside a softmax (pointer sentinel mixtures, arXiv
1609.07843), whose weight follows from the match alone. The mixture is the law that is handed up; nothing else changes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .suffix_automaton import FollowedText

MOST = 0.5
"""Weight of a long match that was always followed by the same id."""

HALFWAY = 32
"""Cube of the matched ids at which half of that is reached.

What makes a target's own text likeliest was estimated with the head that ships: after 4 to 16 ids that were always
followed by the same one 0.4 to 0.5, whatever the task; after 1, 2 and 3 ids 0.15, 0.3 and 0.4 in answers about given
texts, 0.02, 0.03 and 0.07 in others, and less where text is sampled at temperature 1. This lies between."""


def weight(again: int, followed: int, length: int) -> float:
    """How much a copied guess counts beside the head's.

    Args:
        again: how often the guess followed; followed: how often anything did.
        length: ids that matched, 1 or more.

    Returns:
        0 to `MOST`.
    """
    return MOST * again / followed * length**3 / (length**3 + HALFWAY)


class CopyMemory:
    """The texts of a batch, indexed as they grow."""

    def __init__(self) -> None:
        self._rows: list[FollowedText] = []

    def forget(self) -> None:
        """Drop all texts."""
        self._rows = []

    def keep_rows(self, rows: Sequence[int]) -> None:
        """Go on with some of the rows; one that is wanted twice is indexed anew in its second place.

        Args:
            rows: which, in their new order.
        """
        if self._rows:
            self._rows = [FollowedText() if r in rows[:i] else self._rows[r] for i, r in enumerate(rows)]

    def follow(self, texts: Sequence[list[int]]) -> CopiedPaths:
        """Bring each row to its text.

        Args:
            texts: the ids of each row, without padding.
        """
        if len(self._rows) != len(texts):
            self._rows = [FollowedText() for _ in texts]
        for row, text in zip(self._rows, texts, strict=True):
            row.follow(text)
        return CopiedPaths(self._rows)


class CopiedPaths:
    """What the texts suggest after each node of the trees, or at the end of the chains, that grow from them.

    Args:
        rows: the texts; none at all where nothing is to be copied.
    """

    def __init__(self, rows: Sequence[FollowedText]) -> None:
        self._rows = rows
        # per row: where each node fed so far stands in its text, and the nodes whose continuations are asked for
        self._roots = [row.automaton.repeated() for row in rows]
        self._fed: list[list[tuple[int, int]]] = [[] for _ in rows]
        self._asked = [[root] for root in self._roots]
        self._taken = [0] * len(rows)

    def extend(self, chains: list[list[int]]) -> None:
        """Follow the chains drafted so far, which are asked about from now on.

        Args:
            chains: ids per row; those of the last time are their beginnings.
        """
        for b, row in enumerate(self._rows):
            for token in chains[b][self._taken[b] :]:
                (place,) = self._asked[b]
                self._asked[b] = [row.automaton.step(*place, token)]
            self._taken[b] = len(chains[b])

    def descend(self, tokens: torch.Tensor, sees: torch.Tensor) -> None:
        """Follow a level's nodes, which are asked about from now on; one host synchronisation.

        Args:
            tokens: `[B, k]`.
            sees: `[B, k, F]`, which of the nodes fed so far, in order, are on the path to each; these k are the last.
        """
        if not self._rows:
            return
        width, before = tokens.shape[1], sees.shape[2] - tokens.shape[1]
        # the nearest ancestor is the last one; 0 for none
        number = torch.arange(1, before + 1, device=sees.device)
        above = (sees[:, :, :before] * number).amax(dim=2) if before else torch.zeros_like(tokens)
        for b, ids in enumerate(torch.cat([tokens, above.to(tokens.device)], dim=1).tolist()):
            places = [self._roots[b], *self._fed[b]]
            step = self._rows[b].automaton.step
            asked = []
            for token, parent in zip(ids[:width], ids[width:], strict=True):
                state, length = places[parent]
                asked.append(step(state, length, token))
            self._asked[b] = asked
            self._fed[b] += asked

    def mixed(self, scores: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """The head's scores with those of copied ids raised.

        Args:
            scores: `[B, n, N]` logits after each node that is asked about.
            ids: `[N]`, what their columns stand for; others are not copied.

        Returns:
            `[B, n, N]` logits of the mixture, up to a constant a node.
        """
        guesses = [
            (b * scores.shape[1] + i, *guess)
            for b, (row, places) in enumerate(zip(self._rows, self._asked, strict=True))
            for i, guess in enumerate(_guess(row, *place) for place in places)  # one for each node
            if guess is not None
        ]
        if not guesses:
            return scores
        nodes, tokens, weights = (list(column) for column in zip(*guesses, strict=True))
        at = torch.tensor(nodes, device=scores.device)
        found, columns = (ids == torch.tensor(tokens, device=ids.device)[:, None]).nonzero(as_tuple=True)
        w = torch.tensor(weights, dtype=scores.dtype, device=scores.device)[found]
        flat, at = scores.flatten(0, 1).clone(), at[found]
        # q + w / (1 - w) [x = c] is the mixture but for a factor, which leaves all other scores as they are
        flat[at, columns] = torch.logaddexp(flat[at, columns], flat[at].logsumexp(-1) + torch.logit(w))
        return flat.view_as(scores)


def _guess(row: FollowedText, state: int, length: int) -> tuple[int, float] | None:
    """What most often followed a place in a text, and its weight; None where nothing did."""
    found = row.automaton.following(state, length)
    if found is None:
        return None
    token, _, seen = found
    return token, weight(*seen)
