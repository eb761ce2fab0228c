# SPDX-License-Identifier: Apache-2.0
"""A small causal LM as the drafter: draws tokens one by one from its own law."""

from __future__ import annotations

import torch
from transformers import LogitsProcessor

from ..exactness.context import Context
from ..exactness.distributions import LawMaker
from ..exactness.judgement import NOTHING
from ..exactness.proposal import Proposal
from ..exactness.row_tensors import fit_vocabulary
from ..host.picking import picks
from ..host.runner import ModelRunner
from .carried import CarriedSizes
from .picking import says_likeliest
from .sequential import SequentialDrafter


class CausalLMDrafter(SequentialDrafter):
    """Drafts a chain of tokens with a causal LM.

    Args:
        runner: the model.
        name, draft_tokens, confidence_threshold, schedule, eos, restriction, draft_temperature, carried: see
            `SequentialDrafter`.
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
        restriction: LogitsProcessor | None = None,
        draft_temperature: float = 1.0,
        carried: CarriedSizes | None = None,
    ) -> None:
        super().__init__(
            name=name,
            draft_tokens=draft_tokens,
            confidence_threshold=confidence_threshold,
            schedule=schedule,
            eos=eos,
            restriction=restriction,
            draft_temperature=draft_temperature,
            carried=carried,
        )
        self.runner = runner

    def begin(self, index: int, batch: int, vocabulary: int) -> None:
        super().begin(index, batch, vocabulary)
        self.stats.notes += [self.runner.note] if self.runner.note else []

    def propose(self, context: Context, limits: list[int], law: LawMaker) -> Proposal:
        batch = context.batch
        tokens: list[list[int]] = [[] for _ in range(batch)]
        limits = self.runner.within(context, limits)
        going = [min(limit, self.draft_tokens) > 0 for limit in limits]
        laws: list[torch.Tensor] = []
        if self.runner.can_read(context):
            with self.stats.timed():
                while any(going):
                    laws.append(self._step(context, tokens, going, law))
                    for b in range(batch):
                        going[b] = going[b] and len(tokens[b]) < min(limits[b], self.draft_tokens)
        self.stats.drafted += sum(len(row) for row in tokens)
        width = max(len(row) for row in tokens)
        q = torch.stack(laws[:width], dim=1) if width and law.draws else None
        return Proposal(tokens, q, [[self.index] * len(row) for row in tokens])

    def prefill(self, context: Context, chunk: int) -> None:
        if self.runner.can_read(context):
            self.runner.prefill(context, chunk, self.stats)

    def keep_rows(self, rows: list[int]) -> None:
        self.runner.keep_rows(rows)

    def add_rows(self, count: int) -> None:
        self.runner.add_rows(count)

    def _step(self, context: Context, tokens: list[list[int]], going: list[bool], law: LawMaker) -> torch.Tensor:
        """Draw the next token of every row that is still going; returns the laws `[B, V]`."""
        nothing: list[list[int]] = [[] for _ in tokens]
        self.runner.asked = going
        if says_likeliest(law) and self.draws_likeliest(law):
            # The level above checks it: which of two ids within rounding it is does not matter.
            longer = context.extended(tokens)
            found = picks(self.runner, longer, nothing, self.stats, self.vocabulary, going, exact=False)
            if found is not None:
                self.take([row[0] if row else 0 for row in found.tokens], tokens, list(going), going)
                return NOTHING[0]
        logits = self.runner.run(context.extended(tokens), nothing, self.stats).logits
        return self.draw(context, tokens, fit_vocabulary(logits, self.vocabulary), list(going), going, law)
