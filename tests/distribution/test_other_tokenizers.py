# SPDX-License-Identifier: Apache-2.0
"""Assistants with another vocabulary, sampled: thousands of draws against the exact distribution.

Seeds are fixed. A correct chain fails a case here with probability 1e-4 (chi-square), the file with 4e-4.
"""

from __future__ import annotations

import pytest
import torch
from exact_laws import exact_law, p_value
from other_words import in_other_ids, word_tokenizer
from tiny_models import noisy, tiny

import hf_polyspec

WORDS = [f"w{i}" for i in range(12)]
OTHERS = ["first", "w11", "w3", "alien", "w7", "w1", "w0", "w8", "w10", "stranger"]
LENGTH, DRAWS, FALSE_ALARM = 3, 4000, 1e-4
PROMPT = torch.tensor([[3, 7, 1, 7]])
TEMPERATURE = 1.5


@pytest.mark.parametrize("rule", ["token", "block"])
@pytest.mark.parametrize("middle", [False, True], ids=["drafter", "middle"])
def test_the_law_is_the_targets(rule: str, middle: bool) -> None:
    """A third of the words cannot be proposed: they come from the residual alone."""
    target = hf_polyspec.attach(tiny("llama", vocab_size=12, num_hidden_layers=1))
    other = in_other_ids(noisy(target, 0.1), WORDS, OTHERS)
    tokenizer = word_tokenizer(OTHERS, begin="first")
    torch.manual_seed(11)
    found = target.generate(
        PROMPT,
        assistant_models=[other, noisy(target, 0.3, seed=2)] if middle else [other],
        tokenizer=word_tokenizer(WORDS),
        assistant_tokenizer=[tokenizer, None] if middle else [tokenizer],
        polyspec_verification=rule,
        do_sample=True,
        temperature=TEMPERATURE,
        top_k=0,
        max_new_tokens=LENGTH,
        num_return_sequences=DRAWS,
        return_dict_in_generate=True,
        polyspec_block_size=2,
    )
    assert found.polyspec.levels[0].accepted > DRAWS / 4
    law = exact_law(target, PROMPT, LENGTH, len(WORDS), lambda _, logits: logits / TEMPERATURE)
    assert p_value(found.sequences, PROMPT, law) > FALSE_ALARM
