# SPDX-License-Identifier: Apache-2.0
"""Drafts for engines that have requests come and go: each is known by its text so far, not by a place in a batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from ..exactness.context import Context, Prompt
from ..exactness.distributions import LawMaker
from ..levels.base import Drafter

SPARE = 16
"""Requests that were not asked about lately and are remembered all the same: engines put some off for a while."""


class _Request:
    """One text, and the levels that follow it."""

    def __init__(self, ids: list[int], drafter: Drafter) -> None:
        self.ids = ids
        self.drafter = drafter
        self.prompt = Prompt(len(ids), None, torch.arange(len(ids))[None])
        self.offered: list[int] = []
        self.asked = 0

    def advance(self, ids: list[int]) -> int:
        """The engine has gone on to `ids`; returns by how many tokens. The levels are told what became of a draft."""
        new = ids[len(self.ids) :]
        if self.offered:
            same = next((i for i, (a, b) in enumerate(zip(self.offered, new, strict=False)) if a != b), None)
            kept = min(len(self.offered), len(new)) if same is None else same
            # The last new token is the engine's own, drawn after those that it accepted.
            self.drafter.observe([len(self.offered)], [min(kept, max(0, len(new) - 1))])
        self.ids, self.offered = ids, []
        return len(new)


class Histories:
    """Proposes continuations of texts that grow from call to call, each by levels of its own.

    A text is recognised by what it begins with: the request whose ids, as last seen, it goes on from. Its place among
    the others means nothing, so rows may be moved, left out and come back; what is forgotten is read anew. Nothing is
    drawn: drafts are the levels' argmax, and say so by having no law (one-hot), which keeps any verifier exact.

    Args:
        make: a drafter for one more request, or a chain of levels under one; it has yet to begin.
        vocabulary: columns V of the laws; ends: ids that end a text.
        device: where the laws are.

    Attributes:
        passes: how often a text went on, so often the engine's model has been run over it since its prompt.
        tokens: by how many tokens, all passes together: `tokens / passes` is the mean acceptance length.
    """

    def __init__(
        self, make: Callable[[], Drafter], vocabulary: int, ends: Sequence[int] = (), device: str = "cpu"
    ) -> None:
        self.make, self.vocabulary = make, vocabulary
        self.law = LawMaker([], False, torch.device(device), ends=frozenset(ends))
        self.passes = self.tokens = 0
        self._open: list[_Request] = []
        self._calls = 0

    def __len__(self) -> int:
        """Requests that are remembered."""
        return len(self._open)

    @torch.no_grad()
    def propose(self, texts: Sequence[list[int]], limits: Sequence[int]) -> list[list[int]]:
        """What may follow each text.

        Args:
            texts: token ids, prompts included; limits: most tokens to offer for each, 0 for none.

        Returns:
            A draft for each text, empty where there is nothing to offer.
        """
        self._calls += 1
        drafts = [self._draft(list(ids), limit) for ids, limit in zip(texts, limits, strict=True)]
        self._forget()
        return drafts

    def close(self) -> None:
        """Forgets all requests."""
        for request in self._open:
            request.drafter.end()
        self._open = []

    def _draft(self, ids: list[int], limit: int) -> list[int]:
        request = self._find(ids)
        request.asked = self._calls
        if limit > 0:
            context = Context([ids], request.prompt)
            request.offered = request.drafter.propose(context, [limit], self.law).tokens[0][:limit]
        return list(request.offered)

    def _find(self, ids: list[int]) -> _Request:
        """The request that has this text, of those that nobody has asked about in this call; or a new one."""
        fitting = [one for one in self._open if one.asked != self._calls and ids[: len(one.ids)] == one.ids]
        # One that would not go on at all is rather another's, who has the same words so far.
        best = max(fitting, key=lambda one: (len(one.ids) < len(ids), len(one.ids)), default=None)
        if best is None:
            drafter = self.make()
            drafter.begin(1, 1, self.vocabulary)
            best = _Request(ids, drafter)
            self._open.append(best)
            return best
        if len(ids) > len(best.ids):
            self.passes += 1
            self.tokens += best.advance(ids)
        return best

    def _forget(self) -> None:
        """Of the requests that this call did not mention, those beyond the last few."""
        idle = sorted((one for one in self._open if one.asked != self._calls), key=lambda one: -one.asked)
        for one in idle[SPARE:]:
            one.drafter.end()
            self._open.remove(one)
