# SPDX-License-Identifier: Apache-2.0
"""Texts that a model wrote, which a copy of it is measured and trained on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Texts:
    """Continuations a model wrote: `[T]` ids each, prompt included, and where each continuation starts."""

    texts: list[Tensor]
    starts: list[int]


@torch.inference_mode()
def continuations(model: Any, prompts: Sequence[Tensor], new_tokens: int, seed: int, sample: bool = True) -> Texts:
    """Let a model continue prompts, sampled at temperature 1 or greedily.

    Args:
        model: A causal LM.
        prompts: Ids `[T]`.
        new_tokens: Tokens to add at most.
        seed: Of the sampling; the global random state is left as it was.
        sample: Whether to sample.
    """
    texts, starts = [], []
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        options: dict[str, Any] = {"do_sample": True, "temperature": 1.0, "top_p": 1.0, "top_k": 0} if sample else {}
        for prompt in prompts:
            ids = prompt[None].to(model.device)
            mask = torch.ones_like(ids)
            text = model.generate(
                ids, attention_mask=mask, max_new_tokens=new_tokens, **(options or {"do_sample": False})
            )[0]
            if len(text) > len(prompt):
                texts.append(text)
                starts.append(len(prompt))
    return Texts(texts, starts)
