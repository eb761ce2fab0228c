# SPDX-License-Identifier: Apache-2.0
"""What drafters that draw token after token have in common: how long they go on, and how a token is drawn."""

from __future__ import annotations

import torch
from transformers import LogitsProcessor

from ..exactness.context import Context
from ..exactness.distributions import LawMaker
from .base import Drafter
from .carried import CarriedSizes


class SequentialDrafter(Drafter):
    """A drafter that draws one token a step from a law of its own.

    A row stops after `draft_tokens` tokens, after an end-of-text token, or after a token whose probability was below
    `confidence_threshold`; that token is still proposed, since leaving it out would bias the result (law 2).

    Args:
        name: shown in telemetry and errors.
        draft_tokens: tokens a round (transformers' `num_assistant_tokens`).
        confidence_threshold: 0 to 1, 0 for never (transformers' `assistant_confidence_threshold`).
        schedule: "constant", or "heuristic"/"heuristic_transient": two more tokens a round after everything proposed
            was accepted, one fewer otherwise (transformers' `num_assistant_tokens_schedule`). "heuristic" begins the
            next generation where this one ended, if there is a place to remember it.
        eos: ids that end a text.
        restriction: run on the scores before everything else, such as a `DraftVocabularyProcessor`.
        draft_temperature: what is drawn is drawn from the law q that a text asks for, to the power of one over this and
            normalised. Below 1 it makes up for a drafter whose guesses are flatter than what it guesses.
        carried: where "heuristic" remembers, None for nowhere.
    """

    shares_noise = True
    tree_tokens = tree_depth = 0  # of one that grows trees as well, where the level above can check them

    def __init__(
        self,
        *,
        name: str,
        draft_tokens: int,
        confidence_threshold: float,
        schedule: str,
        eos: frozenset[int],
        restriction: LogitsProcessor | None = None,
        draft_temperature: float = 1.0,
        carried: CarriedSizes | None = None,
    ) -> None:
        self.name = name
        super().__init__()
        self.carried = carried if schedule == "heuristic" else None
        known = None if self.carried is None else self.carried.draft_tokens
        self.draft_tokens = draft_tokens if known is None else known
        self.confidence_threshold = confidence_threshold
        self.schedule = schedule
        self.eos = eos
        self.restriction = restriction
        self.draft_temperature = draft_temperature
        self.vocabulary = 0

    @property
    def most_tokens(self) -> int:
        return max(self.tree_depth, self.draft_tokens) if self.tree_tokens else self.draft_tokens

    @property
    def tree_nodes(self) -> int:
        return self.tree_tokens

    def begin(self, index: int, batch: int, vocabulary: int) -> None:
        super().begin(index, batch, vocabulary)
        self.vocabulary = vocabulary

    def end(self) -> None:
        # A control that steers the chain by its own measurements has set the schedule to "constant".
        if self.carried is not None and self.schedule == "heuristic":
            self.carried.draft_tokens = self.draft_tokens

    def observe(self, drafted: list[int], accepted: list[int]) -> None:
        judged = [(d, a) for d, a in zip(drafted, accepted, strict=True) if d]
        self.stats.accepted += sum(a for _, a in judged)
        if self.schedule == "constant" or not judged:
            return
        everything = all(d == a for d, a in judged)
        self.draft_tokens = self.draft_tokens + 2 if everything else max(1, self.draft_tokens - 1)

    def draw(
        self,
        context: Context,
        tokens: list[list[int]],
        logits: torch.Tensor,
        drawing: list[bool],
        going: list[bool],
        law: LawMaker,
    ) -> torch.Tensor:
        """Draw the next token of the rows that are `drawing`, with one host synchronisation.

        Args:
            context: the rows before the draft; tokens: drawn so far, extended in place.
            logits: `[B, 1, V]` of the next position.
            drawing: rows that get a token now; going: set to False for rows that stop after this step.
            law: this level's law maker.

        Returns:
            `[B, V]`, the laws drawn from, where the level above tests against them; else without meaning.
        """
        context = context.extended(tokens)
        scores = self._scores(context, logits, law, drawing)
        # Processors may forbid every id that this drafter knows: there is then nothing to draw from.
        usable = torch.isfinite(scores).any(-1)
        scores = torch.where(usable[:, None], scores, 0.0)
        sure = self.confidence_threshold > 0
        scores = law.tempered(scores, self.draft_temperature)
        q = law.probabilities(scores) if law.draws or sure else scores
        if law.draws:
            chosen = law.draw(q, drawing)
        else:
            chosen = law.choose(scores[:, None], context, [[0]] * len(going), drawing)[:, 0]
        usable = usable & (chosen >= 0)  # [B]
        own = chosen.clamp(min=0)[:, None]
        confidence = q.gather(1, own).squeeze(1) if sure else torch.ones_like(usable, dtype=q.dtype)
        # Packed into one tensor so that reading all is one synchronisation; float32 holds every id below 2^24.
        packed = torch.stack([chosen.to(q.dtype), confidence, usable.to(q.dtype)], dim=1).tolist()
        for b, (token, probability, possible) in enumerate(packed):
            if drawing[b] and not possible:
                going[b] = False
            elif drawing[b]:
                tokens[b].append(int(token))
                going[b] = int(token) not in self.eos and probability >= self.confidence_threshold
        return q

    def draws_likeliest(self, law: LawMaker) -> bool:
        """Whether `draw` comes to the likeliest id by a drafter's own scores, whatever they are."""
        return law.picks_likeliest and self.restriction is None and self.confidence_threshold == 0

    def take(self, chosen: list[int], tokens: list[list[int]], drawing: list[bool], going: list[bool]) -> None:
        """`draw` where the ids are known, one a row."""
        for b, token in enumerate(chosen):
            if drawing[b]:
                tokens[b].append(token)
                going[b] = token not in self.eos

    def _scores(self, context: Context, logits: torch.Tensor, law: LawMaker, drawing: list[bool]) -> torch.Tensor:
        if self.restriction is not None:
            ids = torch.empty(context.batch, 0, dtype=torch.long, device=logits.device)
            logits = self.restriction(ids, logits)
        return law.next_scores(context, logits[:, 0], drawing)  # [B, V]
