# SPDX-License-Identifier: Apache-2.0
"""Prompts as ids: through the model's chat template where it has one."""

from __future__ import annotations

import torch
from tiny_checkpoints import byte_tokenizer

from hf_polyspec.models.conversation import encode, encode_prompt, messages

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<go>{% endif %}"
)


def test_a_prompt_is_wrapped_in_the_chat_template() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATE
    inputs = encode_prompt(tokenizer, "why?", "cpu")
    assert tokenizer.decode(inputs["input_ids"][0]) == "<user>why?<go>"
    assert inputs["input_ids"].shape == inputs["attention_mask"].shape
    assert bool((inputs["attention_mask"] == 1).all())


def test_a_prompt_without_a_template_is_what_the_tokenizer_makes_of_it() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = None
    inputs, plain = encode_prompt(tokenizer, "why?", "cpu"), tokenizer("why?", return_tensors="pt")
    assert sorted(inputs) == ["attention_mask", "input_ids"]
    assert all(torch.equal(inputs[name], plain[name]) for name in inputs)


def test_a_conversation_keeps_its_order() -> None:
    tokenizer = byte_tokenizer()
    ids = encode(tokenizer, messages(["a?", "b?"], ["a!"], "be brief"), TEMPLATE)
    assert tokenizer.decode(ids) == "<system>be brief<user>a?<assistant>a!<user>b?<go>"
