# SPDX-License-Identifier: Apache-2.0
"""What a head guesses after some states: its own law over the working vocabulary, mixed with what pointers suggest."""

from __future__ import annotations

import torch

from ..cpu.compiled import computes
from .draft_vocabulary import WorkingVocabulary
from .pointers import PointerMixture


class Guesser:
    """Guesses of one round, compiled where numbers lie on the CPU, by torch's own operations elsewhere.

    Args:
        working: scores some ids, the same ones all through the round.
        pointed: says what is raised after what is asked about.
    """

    def __init__(self, working: WorkingVocabulary, pointed: PointerMixture) -> None:
        self.working = working
        self.pointed = pointed
        self.ids = working.target_ids

    def scores(self, states: torch.Tensor) -> torch.Tensor:
        """The mixture's logits `[B, n, N]` after each node that is asked about, up to a constant a node."""
        found = self._compiled(states, 0)
        return self.pointed.mixed(self.working.score(states), self.ids) if found is None else found[0]

    def likeliest(self, states: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Of the ids likeliest after each node: log-probabilities and ids, each `[B, n, min(count, N)]`."""
        count = min(count, len(self.ids))
        found = self._found(states, count) if count > 1 else None
        if found is None:
            return self.working.best(self.pointed.mixed(self.working.score(states), self.ids), count)
        best, columns = found
        return best, self.ids[columns]

    def first(self, states: torch.Tensor) -> list[int]:
        """The likeliest id after each of `[B, 1, H]`."""
        found = self._found(states, 1)
        if found is None:
            columns = self.pointed.mixed(self.working.score(states), self.ids)[:, 0].argmax(-1)
        else:
            columns = found[1][:, 0, 0]
        ids: list[int] = self.ids[columns].tolist()
        return ids

    def _found(self, states: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Log-probabilities (scores of one) and columns, each `[B, n, count]`, by compiled functions."""
        here = computes(states) and self.working.device.type == "cpu"
        task = self.working.task(states, count) if here else None
        if task is None:
            found = self._compiled(states, count)
            return None if found is None else found[1:]
        best, columns = task.run(states.contiguous(), self.pointed.raised(self.working.columns_of))
        shape = (*states.shape[:2], count)
        return best.clone().view(shape), columns.view(shape)

    def _compiled(self, states: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None:
        """See `compiled.guesses`; None where that does not run."""
        if not computes(states) or self.working.device.type != "cpu":
            return None
        pieces = self.working.pieces(states)
        if pieces is None or not computes(pieces[0]) or len({piece.dtype for piece in pieces}) > 1:
            return None
        from ..cpu.compiled.guesses import guesses

        pieces = [piece.contiguous() for piece in pieces]
        return guesses(pieces, self.pointed.raised(self.working.columns_of), count)
