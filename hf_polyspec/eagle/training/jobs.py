# SPDX-License-Identifier: Apache-2.0
"""One text under way, and how its next token is drawn."""

from __future__ import annotations

from dataclasses import dataclass, field
from random import Random

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_polyspec.eagle.training.kept_states import UNKNOWN, Seen


@dataclass
class Job:
    """One text being written.

    Args:
        number: the sample's number.
        asking: whether the target is still inventing the prompt.
        tokens: all ids so far, fed or not.
        start: where the part being written begins.
        limit: most ids of that part.
        kind: `GREEDY` or `SAMPLED`.
        random: this part's random numbers.
        fed: ids the model has seen.
        states: `[n, F + H_t]` each, what it computed on them, where that is kept.
        best: what it held most likely after each of them.
    """

    number: int
    asking: bool
    tokens: list[int]
    start: int
    limit: int
    kind: int
    random: Random
    fed: int = 0
    states: list[torch.Tensor] = field(default_factory=list)
    best: list[int] = field(default_factory=list)

    def look(self, states: torch.Tensor) -> None:
        """Takes the states `[n, F + H_t]` of the ids that were just fed."""
        self.states.append(states)
        self.best += [UNKNOWN] * len(states)

    def seen(self) -> Seen | None:
        """What the model computed on all ids that it has seen, None where nothing was kept."""
        if not self.states:
            return None
        return Seen(torch.cat(self.states).numpy(), np.array(self.best, dtype=np.int32))


def draw(logits: torch.Tensor, uniforms: torch.Tensor, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Draws one token a row by inverting its cumulative distribution.

    Args:
        logits: `[R, V]`.
        uniforms: `[R]`, a number in [0, 1) for each row, or a negative one for the most likely token.
        temperature: above 0.

    Returns:
        Ids and the most likely ones, `[R]` each.
    """
    best = logits.argmax(dim=-1)
    tokens = best.clone()
    sampled = (uniforms >= 0).nonzero()[:, 0]
    if len(sampled):
        # [S, V]; the first id whose cumulative probability exceeds the uniform number
        cumulative = torch.softmax(logits[sampled].float() / temperature, dim=-1).cumsum(dim=-1)
        heights = uniforms[sampled, None].to(cumulative.dtype) * cumulative[:, -1:]
        picked = torch.searchsorted(cumulative, heights, right=True)[:, 0]
        tokens[sampled] = picked.clamp(max=logits.shape[-1] - 1)
    return tokens, best


def stop_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """The ids that end an answer: the generation config's and the tokenizer's.

    Args:
        model: the target.
        tokenizer: its tokenizer.
    """
    config = model.generation_config
    listed = config.eos_token_id if config is not None else None
    found = {listed} if isinstance(listed, int) else set(listed or [])
    if tokenizer.eos_token_id is not None:
        found.add(tokenizer.eos_token_id)
    return frozenset(int(i) for i in found if isinstance(i, int))
