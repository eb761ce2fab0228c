# SPDX-License-Identifier: Apache-2.0
"""A head's guesses mixed with what is known without it: pointers beside its softmax.

A head of one layer finds it hard to look a name or a phrase up in its context, and what the level above said about
guesses that came to nothing is lost to it. Both are known for nothing. So each guess is drawn from

    (1 - w) q + w m,

q being the head's law, m what a pointer suggests, and w its weight, which follows from what was known before the guess
(pointer sentinel mixtures, arXiv 1609.07843). The mixture is the law that is handed up; nothing else changes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Protocol

import torch

Place = tuple[int, ...]
"""What a pointer remembers of a path."""

Suggestion = tuple[float, Sequence[int], Sequence[float]]
"""The weight w, between 0 and 1, and m: ids, none of them twice, and the probability of each."""


class Pointer(Protocol):
    """Knows, of one text, what is likely to follow it, and to follow what goes on from it."""

    def root(self) -> Place:
        """The end of the text."""

    def step(self, place: Place, token: int) -> Place:
        """The place after one more id."""

    def suggestion(self, place: Place) -> Suggestion | None:
        """What is likely there; None where nothing is known."""


class TailPointer:
    """What is common to pointers that remember the last few ids.

    Args:
        longest: most ids that matter.
    """

    def __init__(self, longest: int) -> None:
        self._longest = longest
        self._tail: Place = ()

    def follow(self, ids: list[int]) -> None:
        """Go on from a text, without padding."""
        self._tail = tuple(ids[-self._longest :])

    def root(self) -> Place:
        return self._tail

    def step(self, place: Place, token: int) -> Place:
        return (*place, token)[-self._longest :]


class PointerMixture:
    """What pointers suggest after each node of the trees, or at the end of the chains, that grow from some texts.

    Args:
        rows: per text, its pointers, the later of which are mixed in last; no rows where there is none.
    """

    def __init__(self, rows: Sequence[Sequence[Pointer]]) -> None:
        self._rows = rows
        # per row: the places of each node fed so far, one a pointer, and those whose continuations are asked for
        self._roots = [tuple(pointer.root() for pointer in row) for row in rows]
        self._fed: list[list[tuple[Place, ...]]] = [[] for _ in rows]
        self._asked = [[root] for root in self._roots]
        self._taken = [0] * len(rows)
        self._sorted: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None  # ids, in order, and from where

    def extend(self, chains: list[list[int]]) -> None:
        """Follow the chains drafted so far, which are asked about from now on.

        Args:
            chains: ids per row; those of the last time are their beginnings.
        """
        for b in range(len(self._rows)):
            for token in chains[b][self._taken[b] :]:
                (places,) = self._asked[b]
                self._asked[b] = [self._step(b, places, token)]
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
        packed = torch.cat([tokens, above.to(tokens.device) - 1], dim=1).tolist()
        self.go_on([row[:width] for row in packed], [row[width:] for row in packed])

    def go_on(self, tokens: list[list[int]], above: list[list[int]]) -> None:
        """`descend` where it is known what is above.

        Args:
            tokens: `[B][k]`; above: the number of each one's parent among the nodes fed before, -1 for none.
        """
        for b, root in enumerate(self._roots):
            fed = self._fed[b]
            pairs = zip(tokens[b], above[b], strict=True)
            self._asked[b] = [self._step(b, fed[parent] if parent >= 0 else root, token) for token, parent in pairs]
            self._fed[b] = fed + self._asked[b]

    def raised(self, columns_of: Callable[[list[int]], list[int | None]]) -> tuple[list[int], list[int], list[float]]:
        """What is to be raised: nodes by their number, row after row, columns, and what is added to probabilities.

        Args:
            columns_of: the columns of ids, None for those without.
        """
        nodes, columns, shares = list[int](), list[int](), list[float]()
        node = 0
        for b, asked in enumerate(self._asked):
            for places in asked:
                found = self._shares(b, places)
                for column, share in zip(columns_of(list(found)), found.values(), strict=True) if found else ():
                    if column is not None and share > 0:
                        nodes.append(node)
                        columns.append(column)
                        shares.append(share)
                node += 1
        return nodes, columns, shares

    def mixed(self, scores: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """The head's scores with those of suggested ids raised.

        Args:
            scores: `[B, n, N]` logits after each node that is asked about.
            ids: `[N]`, what their columns stand for; others are not suggested.

        Returns:
            `[B, n, N]` logits of the mixture, up to a constant a node.
        """
        raised = [
            (b * scores.shape[1] + i, token, math.log(share))
            for b, asked in enumerate(self._asked)
            for i, places in enumerate(asked)
            for token, share in self._shares(b, places).items()
            if share > 0
        ]
        if not raised:
            return scores
        nodes, tokens, shares = (list(column) for column in zip(*raised, strict=True))
        found, columns = self._columns_of(tokens, ids)
        at = torch.tensor(nodes, device=scores.device)[found]
        log_share = torch.tensor(shares, dtype=scores.dtype, device=scores.device)[found]
        flat = scores.flatten(0, 1).clone()
        whole = flat.logsumexp(-1)  # [B n]
        # q + share [x = c] is the mixture but for a factor, which leaves all other scores as they are
        flat[at, columns] = torch.logaddexp(flat[at, columns], whole[at] + log_share)
        return flat.view_as(scores)

    def _columns_of(self, tokens: list[int], ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Which of the tokens are among the ids, and where: places in both lists."""
        if self._sorted is None or self._sorted[0] is not ids:  # the same ones all through a round
            self._sorted = (ids, *ids.sort())
        _, in_order, columns = self._sorted
        wanted = torch.tensor(tokens, device=ids.device)
        at = torch.searchsorted(in_order, wanted).clamp(max=len(ids) - 1)
        found = (in_order[at] == wanted).nonzero().flatten()
        return found, columns[at[found]]

    def _step(self, row: int, places: tuple[Place, ...], token: int) -> tuple[Place, ...]:
        return tuple(pointer.step(place, token) for pointer, place in zip(self._rows[row], places, strict=True))

    def _shares(self, row: int, places: tuple[Place, ...]) -> dict[int, float]:
        """What is added to the head's probabilities of ids, all relative to what is left of the head's law."""
        head, added = 1.0, dict[int, float]()
        for pointer, place in zip(self._rows[row], places, strict=True):
            suggestion = pointer.suggestion(place)
            if suggestion is not None:
                weight, tokens, probabilities = suggestion
                head *= 1 - weight
                added = {token: share * (1 - weight) for token, share in added.items()}
                for token, probability in zip(tokens, probabilities, strict=True):
                    added[token] = added.get(token, 0.0) + weight * probability
        return {token: share / head for token, share in added.items()}
