# SPDX-License-Identifier: Apache-2.0
"""Sampling twice after one seed, without and with levels below: what several test files compare."""

from __future__ import annotations

from typing import Any

import torch

CHANCES: dict[str, Any] = {"do_sample": True, "max_new_tokens": 16, "return_dict_in_generate": True}
ENDS: dict[str, Any] = {"eos_token_id": [5, 6, 7, 8, 9], "pad_token_id": 0}


def sampled(model: Any, seed: int, **options: Any) -> tuple[Any, torch.Tensor]:
    """generate()'s output after a seed, and where it left torch's default generator."""
    torch.manual_seed(seed)
    output = model.generate(**{**CHANCES, **options})
    return output, torch.get_rng_state()


def check(model: Any, levels: list[Any], seed: int, own: dict[str, Any] | None = None, **options: Any) -> Any:
    """Both texts after a seed are equal, and the generator stands where plain generation left it.

    Args:
        model: the target; levels: below it; own: options that only the chain understands.

    Returns:
        The chain's statistics.
    """
    plain, before = sampled(model, seed, **options)
    ours, after = sampled(model, seed, assistant_models=levels, **options, **(own or {}))
    assert ours.sequences.tolist() == plain.sequences.tolist()
    assert torch.equal(after, before), "the generator stands elsewhere"
    assert ours.polyspec.seed_holds, ours.polyspec.levels[0].notes
    return ours.polyspec


def check_texts(model: Any, levels: list[Any], inputs: dict[str, Any], tokens: int) -> None:
    """Greedy and sampled texts are plain generation's, and some of what the last level drafts is kept, not all."""
    greedy = {"max_new_tokens": tokens, "do_sample": False, "return_dict_in_generate": True, **inputs}
    found = model.generate(**greedy, assistant_models=levels)
    assert torch.equal(found.sequences, model.generate(**greedy).sequences)
    assert found.polyspec.levels[-1].drafted > found.polyspec.levels[-1].accepted > 0
    texts = [check(model, levels, seed, **inputs, temperature=0.7, eos_token_id=5) for seed in (1, 3)]
    assert sum(statistics.levels[-1].accepted for statistics in texts) > 0
