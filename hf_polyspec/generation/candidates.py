# SPDX-License-Identifier: Apache-2.0
"""A chain as the candidate generator of transformers' own assisted decoding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import GenerationConfig, LogitsProcessorList

from ..exactness.context import Context, Prompt
from ..exactness.distributions import LawMaker
from ..host.compatibility import check_options, vocabulary_size
from ..host.generation import CandidateGenerator
from .chain import build_below, check_assistants
from .options import PolySpecOptions
from .setting import Setting


class PolySpecCandidateGenerator(CandidateGenerator):
    """Proposes what a chain of assistants has drafted and checked among itself; transformers checks it last.

    The logits it returns are those of the topmost assistant's own law, so transformers' speculative sampling stays
    exact. transformers has no argument for a candidate generator; override `_get_candidate_generator` of the model's
    class to return one of these.

    Args:
        target: the model that generates.
        assistant_models: as for `generate()`, the slowest first.
        generation_config: as prepared by generate(), with `max_length` set.
        logits_processor: the prepared processors; the chain runs copies of those that keep state.
        device: where candidates are wanted, by default the target's.

    Raises:
        ValueError, TypeError: as `generate(assistant_models=...)`.
    """

    def __init__(
        self,
        target: Any,
        assistant_models: Sequence[Any],
        generation_config: GenerationConfig,
        logits_processor: LogitsProcessorList | None = None,
        device: torch.device | None = None,
    ) -> None:
        check_options(generation_config)
        assistants = check_assistants(target, assistant_models)
        device = device or target.device
        eos = generation_config.eos_token_id
        ends = frozenset(eos if isinstance(eos, list) else [] if eos is None else [int(eos)])
        options = PolySpecOptions.read({}, generation_config)
        if options.polyspec_verification == "coupled" or options.polyspec_seed is not None:
            raise ValueError(
                'polyspec_verification="coupled" and polyspec_seed need the target in the chain; here transformers '
                "verifies the candidates, with draws of its own. Leave them out, or use generate(assistant_models=...)."
            )
        self.chain = build_below(assistants, Setting(options, device, ends, 0, batch=1))
        self.chain.begin(1, 1, vocabulary_size(target))
        self.law = LawMaker(logits_processor or [], bool(generation_config.do_sample), device, ends=ends)
        self.max_length = generation_config.max_length
        self._proposed = 0
        self._prompt: Prompt | None = None

    def get_candidates(
        self, input_ids: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Candidates for one row.

        Args:
            input_ids: `[1, L]`.
            *args: whatever else this release of transformers tells its generators.
            **kwargs: likewise.

        Returns:
            `[1, L + K]` ids, and `[1, K, V]` logits whose softmax is the law they were drawn from (None if greedy).
        """
        length = input_ids.shape[1]
        if self._prompt is None:
            self._prompt = Prompt(length, None, torch.arange(length)[None])
        # transformers adds a token of its own to whatever it accepts.
        room = max(0, self.max_length - length - 1)
        context = Context([[int(token) for token in input_ids[0].tolist()]], self._prompt)
        try:
            proposal = self.chain.propose(context, [room], self.law.fork(1))
        finally:
            self.law.settle()
        self._proposed = proposal.width
        new = torch.tensor(proposal.tokens, dtype=torch.long, device=input_ids.device).reshape(1, -1)
        logits = None if proposal.q is None else proposal.q.to(input_ids.device).log()
        return torch.cat([input_ids, new], dim=1), logits

    def update_candidate_strategy(self, input_ids: torch.Tensor, scores: torch.Tensor, num_matches: int) -> None:
        """Tell the chain how many of its candidates were accepted."""
        self.chain.observe([self._proposed], [int(num_matches)])
