# SPDX-License-Identifier: Apache-2.0
"""A transformers `CandidateGenerator` as the lowest level of a chain."""

from __future__ import annotations

import inspect

import torch

from ..errors import level_failures
from ..exactness.context import Context
from ..exactness.distributions import LawMaker
from ..exactness.proposal import Proposal
from ..exactness.row_tensors import fit_vocabulary
from ..host.generation import CandidateGenerator
from .base import Drafter


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
        self._asked = None
        self.vocabulary = vocabulary

    def propose(self, context: Context, limits: list[int], law: LawMaker) -> Proposal:
        ids = torch.tensor([context.visible(0)], dtype=torch.long, device=law.device)  # [1, L]
        if limits[0] < 1 or ids.shape[1] == 0:
            return Proposal([[]], None, [[]])
        with self.stats.timed():
            with level_failures(f"{self.name} failed to propose"):
                candidates, logits = self.generator.get_candidates(ids, **self._older_arguments())
            new = candidates[0, ids.shape[1] :][: limits[0]]
            # Cutting at the limit looks at no value, so it leaves the law alone.
            tokens = [int(token) for token in new.tolist()]
            q = None
            if logits is not None and law.draws and tokens:
                wide = logits[:, : len(tokens)].to(device=law.device, dtype=torch.float32)
                q = fit_vocabulary(wide, self.vocabulary).softmax(dim=-1)  # [1, K, V]
        self.stats.drafted += len(tokens)
        self._asked = (ids, len(tokens))
        return Proposal([tokens], q, [[self.index] * len(tokens)])

    def _older_arguments(self) -> dict[str, bool]:
        """What generators had to be told in older releases of transformers."""
        told = "is_first_iteration" in inspect.signature(self.generator.get_candidates).parameters
        return {"is_first_iteration": self._asked is None} if told else {}

    def observe(self, drafted: list[int], accepted: list[int]) -> None:
        if self._asked is None or not drafted[0]:
            return
        ids, count = self._asked
        self.stats.accepted += accepted[0]
        # The generators of transformers look at the number of matches and at the shape of the scores.
        scores = torch.zeros(1, count + 1, 1, device=ids.device)
        self.generator.update_candidate_strategy(ids, scores, accepted[0])
