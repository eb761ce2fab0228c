# SPDX-License-Identifier: Apache-2.0
"""Prompts side by side, and from what a model wrote back to text."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch


def pad_left(rows: Sequence[Sequence[int]], pad: int, device: Any) -> dict[str, torch.Tensor]:
    """`input_ids` and `attention_mask` `[B, L]` of prompts of different lengths."""
    width = max(len(row) for row in rows)
    ids = torch.full((len(rows), width), pad, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for b, row in enumerate(rows):
        ids[b, width - len(row) :] = torch.tensor(list(row), dtype=torch.long)
        mask[b, width - len(row) :] = 1
    return {"input_ids": ids.to(device), "attention_mask": mask.to(device)}


def cut_at_end(ids: Sequence[int], ends: Iterable[int]) -> list[int]:
    """Generated ids up to and including the first that ends the text; what follows it is padding."""
    stop = set(ends)
    for i, token in enumerate(ids):
        if token in stop:
            return list(ids[: i + 1])
    return list(ids)


def decode(tokenizer: Any, ids: Sequence[int]) -> str:
    """The text of an answer, without special tokens."""
    return str(tokenizer.decode(list(ids), skip_special_tokens=True)).strip()


def stop_ids(tokenizer: Any, model: Any, names: Sequence[str] | None) -> list[int]:
    """The ids that end an answer: those of the named tokens, else the model's own.

    Raises:
        ValueError: the tokenizer has no such token.
    """
    if names is not None:
        vocabulary = tokenizer.get_vocab()
        missing = [name for name in names if name not in vocabulary]
        if missing:
            raise ValueError(f"The tokenizer has no token {missing[0]!r}, which is to end an answer.")
        return [int(vocabulary[name]) for name in names]
    from ..models.assistants import end_ids

    return end_ids(model)
