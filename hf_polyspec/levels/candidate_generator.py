# SPDX-License-Identifier: Apache-2.0
"""Both ways between a chain and transformers' `CandidateGenerator`."""

from __future__ import annotations

from typing import Any

import torch
from transformers.generation.candidate_generator import CandidateGenerator

from ..context import Context, Prompt
from ..distributions import LawMaker, fit_vocabulary
from .base import Drafter, Proposal


class CandidateGeneratorDrafter(Drafter):
    """Any transformers candidate generator as the lowest level of a chain.

    Its logits, if it returns any, must be the (processed) ones its tokens were drawn from, which is transformers' own
    contract; a generator without logits is treated as not having drawn.

    Args:
        generator: works on one row at a time.
    """

    max_batch = 1

    def __init__(self, generator: CandidateGenerator) -> None:
        self.name = type(generator).__name__
        super().__init__()
        if getattr(generator, "requires_model_outputs", False):
            raise ValueError(
                f"{self.name} reads the target's own hidden states, which a chain does not hand down; "
                "use it with transformers' assisted generation."
            )
        self.generator = generator
        self.vocabulary = 0
        self._asked: tuple[torch.Tensor, int] | None = None

    def begin(self, index: int, batch: int, vocabulary: int) -> None:
        super().begin(index, batch, vocabulary)
        self.vocabulary = vocabulary

    def propose(self, context: Context, limits: list[int], law: LawMaker) -> Proposal:
        ids = torch.tensor([context.visible(0)], dtype=torch.long, device=law.device)  # [1, L]
        if limits[0] < 1 or ids.shape[1] == 0:
            return Proposal([[]], None, [[]])
        with self.stats.timed():
            candidates, logits = self.generator.get_candidates(ids)
            new = candidates[0, ids.shape[1] :][: limits[0]]
            # Cutting at the limit looks at no value, so it leaves the law alone.
            tokens = [int(token) for token in new.tolist()]
            q = None
            if logits is not None and law.do_sample and tokens:
                wide = logits[:, : len(tokens)].to(device=law.device, dtype=torch.float32)
                q = fit_vocabulary(wide, self.vocabulary).softmax(dim=-1)  # [1, K, V]
        self.stats.drafted += len(tokens)
        self._asked = (ids, len(tokens))
        return Proposal([tokens], q, [[self.index] * len(tokens)])

    def observe(self, drafted: list[int], accepted: list[int]) -> None:
        if self._asked is None or not drafted[0]:
            return
        ids, count = self._asked
        self.stats.accepted += accepted[0]
        # The generators of transformers look at the number of matches and at the shape of the scores.
        scores = torch.zeros(1, count + 1, 1, device=ids.device)
        self.generator.update_candidate_strategy(ids, scores, accepted[0])


class PolySpecCandidateGenerator(CandidateGenerator):
    """A chain of models as the candidate generator of transformers' own assisted decoding.

    The candidates are what the chain's top level has checked, and the logits returned are that level's own law, so
    transformers' speculative sampling stays exact.

    Args:
        chain: a level of this package, already begun, such as the `below` of a chain built by `build_chain`.
        law: the law maker that the chain works with.
        max_length: visible ids at which generation stops.
        limit: most candidates per call.
    """

    def __init__(self, chain: Drafter, law: LawMaker, max_length: int, limit: int = 32) -> None:
        self.chain = chain
        self.law = law
        self.max_length = max_length
        self.limit = limit
        self._proposed = 0
        self._prompt_width: int | None = None

    def get_candidates(self, input_ids: torch.LongTensor, **kwargs: Any) -> tuple[torch.LongTensor, torch.Tensor | None]:
        """Candidates for one row.

        Args:
            input_ids: `[1, L]`.

        Returns:
            `[1, L + K]` ids and `[1, K, V]` logits whose softmax is the law they were drawn from (None when greedy).
        """
        length = input_ids.shape[1]
        if self._prompt_width is None:
            self._prompt_width = length
        room = min(self.limit, self.max_length - length - 1)
        prompt = Prompt(self._prompt_width, None, torch.arange(self._prompt_width)[None])
        context = Context([[int(token) for token in input_ids[0].tolist()]], prompt)
        proposal = self.chain.propose(context, [max(0, room)], self.law)
        self._proposed = proposal.width
        new = torch.tensor(proposal.tokens, dtype=torch.long, device=input_ids.device).reshape(1, -1)
        candidates = torch.cat([input_ids, new], dim=1)
        return candidates, None if proposal.q is None else proposal.q.log()  # type: ignore[return-value]

    def update_candidate_strategy(self, input_ids: torch.LongTensor, scores: torch.Tensor, num_matches: int) -> None:
        """Tell the chain how many of its candidates were accepted."""
        self.chain.observe([self._proposed], [int(num_matches)])
