# SPDX-License-Identifier: Apache-2.0
"""Rotary frequencies that change with a text's length: no pass may reach across a change."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_models import noisy, prompts, tiny
from transformers import DynamicCache

from hf_polyspec import SuffixDrafter
from hf_polyspec.host.release import GENERATION_CACHE

SWITCH = 24


def changing(kind: str) -> Any:
    if kind == "dynamic":
        rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
        return tiny("llama", max_position_embeddings=SWITCH, rope_parameters=rope)
    rope = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "factor": 4.0,
        "original_max_position_embeddings": SWITCH,
        "short_factor": [1.0, 1.1, 1.2, 1.3],
        "long_factor": [2.0, 3.0, 4.0, 5.0],
    }
    own = {"original_max_position_embeddings": SWITCH} if kind == "phi3" else {}
    return tiny(kind, rope_parameters=rope, sliding_window=None, **own)


def forgets(model: Any) -> bool:
    """Whether plain generation, when it throws its cache away at the change, does not read the text again."""
    cache = DynamicCache()
    cache.update(torch.zeros(1, 1, SWITCH, 1), torch.zeros(1, 1, SWITCH, 1), 0)
    ids = torch.ones(1, SWITCH + 1, dtype=torch.long)
    made = model.prepare_inputs_for_generation(ids, next_sequence_length=1, **{GENERATION_CACHE: cache})
    return made.get(GENERATION_CACHE) is None and made["input_ids"].shape[1] == 1


@pytest.mark.parametrize("kind", ["phi3", "llama", "dynamic"])
@pytest.mark.parametrize("rows", [1, 3])
def test_the_text_of_plain_generation_on_both_sides(enabled: None, kind: str, rows: int) -> None:
    """Prompts before the change, one short of it, at it and behind it."""
    model = changing(kind)
    # Beyond its length a dynamic model goes on with whatever frequencies its last text had left in it.
    for length in (14, SWITCH - 1) if kind == "dynamic" else (14, SWITCH - 1, SWITCH, SWITCH + 4):
        options = {**prompts(rows, length), "max_new_tokens": 16, "do_sample": False}
        # Some releases drop the cache at the change and then read nothing but the last token: no text to be equal to.
        plain = model.generate(**options, **({"use_cache": False} if forgets(model) else {}))
        for chain in (
            [noisy(model, 0.0)],
            [noisy(model, 0.02), noisy(model, 0.04, seed=2)],
            [SuffixDrafter(min_match=1)],
        ):
            assert model.generate(**options, assistant_models=chain).tolist() == plain.tolist(), length
