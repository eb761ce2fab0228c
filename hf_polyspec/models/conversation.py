# SPDX-License-Identifier: Apache-2.0
"""From what was said to token ids, through the model's chat template."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

Message = dict[str, str]


def messages(turns: Sequence[str], answers: Sequence[str] = (), system: str | None = None) -> list[Message]:
    """A conversation that is now to be answered.

    Args:
        turns: what the user said so far, one more than there are answers.
        answers: what the model said in between.
        system: the system message, or None for the template's own.
    """
    found: list[Message] = [] if system is None else [{"role": "system", "content": system}]
    for i, turn in enumerate(turns):
        found.append({"role": "user", "content": turn})
        if i < len(answers):
            found.append({"role": "assistant", "content": answers[i]})
    return found


def encode(tokenizer: Any, conversation: list[Message], template: str | None = None) -> list[int]:
    """Prompt ids of a conversation.

    Args:
        tokenizer: the model's.
        conversation: as `messages` makes it.
        template: a chat template to use instead of the tokenizer's own.

    Returns:
        The ids; without any template, those of the texts on lines of their own.
    """
    if template or getattr(tokenizer, "chat_template", None):
        made = tokenizer.apply_chat_template(
            conversation, chat_template=template, add_generation_prompt=True, return_dict=True
        )
        return [int(token) for token in made["input_ids"]]
    text = "\n\n".join(message["content"] for message in conversation)
    return [int(token) for token in tokenizer(text)["input_ids"]]


def encode_prompt(tokenizer: Any, prompt: str, device: Any) -> dict[str, torch.Tensor]:
    """`input_ids` and `attention_mask` `[1, T]` of what one user said first, as `generate()` takes them."""
    ids = torch.tensor([encode(tokenizer, messages([prompt]))], dtype=torch.long, device=device)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
