# SPDX-License-Identifier: Apache-2.0
"""A small causal LM as the drafter: draws tokens one by one from its own law."""

from __future__ import annotations

import torch

from ..context import Context
from ..distributions import LawMaker, fit_vocabulary
from ..runner import ModelRunner
from .base import Drafter, Proposal


class CausalLMDrafter(Drafter):
    """Drafts a chain of tokens with a causal LM.

    A row stops after `draft_tokens` tokens, after an end-of-text token, or after a token whose probability was below
    `confidence_threshold`; that token is still proposed, since leaving it out would bias the result (law 2).

    Args:
        runner: the model.
        name: shown in telemetry and errors.
        draft_tokens: tokens a round (transformers' `num_assistant_tokens`).
        confidence_threshold: 0 to 1, 0 for never (transformers' `assistant_confidence_threshold`).
        schedule: "constant", or "heuristic"/"heuristic_transient": two more tokens a round after a row had everything
            accepted, one fewer otherwise (transformers' `num_assistant_tokens_schedule`; nothing is written back to
            the model's generation config, so both forget at the end of the call).
        eos: ids that end a text.
    """

    def __init__(
        self,
        runner: ModelRunner,
        *,
        name: str,
        draft_tokens: int = 5,
        confidence_threshold: float = 0.0,
        schedule: str = "constant",
        eos: frozenset[int] = frozenset(),
    ) -> None:
        self.name = name
        super().__init__()
        self.runner = runner
        self.draft_tokens = draft_tokens
        self.confidence_threshold = confidence_threshold
        self.schedule = schedule
        self.eos = eos
        self.vocabulary = 0

    def begin(self, index: int, batch: int, vocabulary: int) -> None:
        super().begin(index, batch, vocabulary)
        self.vocabulary = vocabulary

    def propose(self, context: Context, limits: list[int], law: LawMaker) -> Proposal:
        batch = context.batch
        tokens: list[list[int]] = [[] for _ in range(batch)]
        going = [min(limit, self.draft_tokens) > 0 for limit in limits]
        laws: list[torch.Tensor] = []
        if self.runner.can_read(context):
            with self.stats.timed():
                while any(going):
                    laws.append(self._step(context, tokens, going, law))
                    for b in range(batch):
                        going[b] = going[b] and len(tokens[b]) < min(limits[b], self.draft_tokens)
        self.stats.drafted += sum(len(row) for row in tokens)
        q = torch.stack(laws, dim=1) if laws and law.do_sample else None
        return Proposal(tokens, q, [[self.index] * len(row) for row in tokens])

    def observe(self, drafted: list[int], accepted: list[int]) -> None:
        judged = [(d, a) for d, a in zip(drafted, accepted, strict=True) if d]
        self.stats.accepted += sum(a for _, a in judged)
        if self.schedule == "constant" or not judged:
            return
        everything = all(d == a for d, a in judged)
        self.draft_tokens = self.draft_tokens + 2 if everything else max(1, self.draft_tokens - 1)

    def prefill(self, context: Context, chunk: int) -> None:
        if self.runner.can_read(context):
            self.runner.prefill(context, chunk, self.stats)

    def keep_rows(self, rows: list[int]) -> None:
        self.runner.keep_rows(rows)

    def _step(self, context: Context, tokens: list[list[int]], going: list[bool], law: LawMaker) -> torch.Tensor:
        """Draw the next token of every row that is still going; returns the laws `[B, V]` (meaningless if greedy)."""
        extended = context.extended(tokens)
        nothing: list[list[int]] = [[] for _ in tokens]
        logits = fit_vocabulary(self.runner.run(extended, nothing, self.stats).logits, self.vocabulary)
        if law.in_order:
            ids = torch.tensor([extended.visible(b) for b in range(extended.batch)], device=logits.device)
            scores = law.scores_at(ids, logits[:, 0])  # [B, V]
        else:
            scores = law.scores(extended, nothing, logits)[:, 0]
        sure = self.confidence_threshold > 0
        q = law.probabilities(scores) if law.do_sample or sure else scores
        chosen = law.draw(q) if law.do_sample else scores.argmax(dim=-1)  # [B]
        if sure:
            confidence = q.gather(1, chosen[:, None]).squeeze(1)
            # Packed into one tensor so that reading both is one synchronisation.
            packed = torch.stack([chosen.double(), confidence.double()], dim=1).tolist()
        else:
            packed = [(token, 1.0) for token in chosen.tolist()]
        for b, (token, probability) in enumerate(packed):
            if going[b]:
                tokens[b].append(int(token))
                going[b] = int(token) not in self.eos and probability >= self.confidence_threshold
        return q
