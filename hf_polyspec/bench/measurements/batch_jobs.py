# SPDX-License-Identifier: Apache-2.0
"""What batches are timed on: prompts of unequal length, equal ones, several texts of one prompt, and questions."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from ...models.conversation import encode_prompt
from ...planning.texts import PROMPTS
from ..questions import read_questions, select

LENGTHS = (40, 769, 90, 180, 300, 64, 120, 230)
"""Ids of the prompts, again and again; the first eight are 1793."""
EQUAL = 230
"""Ids of equal prompts."""
KINDS = ("unequal", "equal", "sequences", "tasks")
SAMPLED = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}


@dataclass(frozen=True)
class Job:
    """One batch.

    Attributes:
        kind: one of `KINDS`; name: the task of a question, the kind elsewhere.
        rows: texts that are written.
        inputs: `input_ids` and `attention_mask` `[B, L]`, padded on the left.
        options: of `generate()`.
    """

    kind: str
    name: str
    rows: int
    inputs: dict[str, torch.Tensor]
    options: dict[str, Any] = field(default_factory=lambda: {"do_sample": False})

    @property
    def title(self) -> str:
        """What it is, in a line."""
        real, columns = int(self.inputs["attention_mask"].sum()), self.inputs["attention_mask"].numel()
        return f"batch {self.rows}, {self.name}: {real} ids of prompts, {columns} padded"


def jobs(tokenizer: Any, kind: str, batches: list[int], questions: str | None = None) -> list[Job]:
    """The batches of a kind.

    Args:
        tokenizer: of the target; kind: one of `KINDS`; batches: numbers of rows; questions are one row each.
        questions: a file of Spec-Bench's form, of which each task's first is asked; None for the package's own.

    Raises:
        ValueError: the file holds no questions.
    """
    if kind == "tasks":
        return [Job(kind, task, 1, encode_prompt(tokenizer, text, "cpu")) for task, text in _asked(questions)]
    if kind == "sequences":  # greedy texts of one prompt would be one text
        alone = prompts(tokenizer, 1, equal=True)
        return [Job(kind, kind, rows, alone, {**SAMPLED, "num_return_sequences": rows}) for rows in batches if rows > 1]
    return [Job(kind, kind, rows, prompts(tokenizer, rows, equal=kind == "equal")) for rows in batches]


def on_device(job: Job, device: torch.device) -> Job:
    """The job with its inputs where the target is."""
    return replace(job, inputs={name: value.to(device) for name, value in job.inputs.items()})


def prompts(tokenizer: Any, batch: int, equal: bool = False) -> dict[str, torch.Tensor]:
    """`input_ids` and `attention_mask` `[B, L]` of pieces of this package's own sources, padded on the left.

    Args:
        tokenizer: of the target; batch: rows; equal: whether all are one prompt of `EQUAL` ids.
    """
    sources = sorted(Path(__file__).resolve().parents[2].glob("*/*.py"), key=lambda path: -path.stat().st_size)
    lengths = [EQUAL if equal else LENGTHS[row % len(LENGTHS)] for row in range(batch)]
    texts = [sources[0 if equal else 2 * row].read_text(encoding="utf-8") for row in range(batch)]
    rows = [tokenizer(text)["input_ids"][40 : 40 + length] for text, length in zip(texts, lengths, strict=True)]
    width = max(map(len, rows))
    ids = torch.zeros(batch, width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, own in enumerate(rows):
        ids[row, width - len(own) :], mask[row, width - len(own) :] = torch.tensor(own), 1
    return {"input_ids": ids, "attention_mask": mask}


def _asked(questions: str | None) -> list[tuple[str, str]]:
    if questions is None:
        return [(f"question {number}", text) for number, text in enumerate(PROMPTS, 1)]
    return [(task, of_task[0].turns[0]) for task, of_task in select(read_questions(questions)[0], None, 1, 0).items()]
