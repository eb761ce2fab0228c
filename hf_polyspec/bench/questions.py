# SPDX-License-Identifier: Apache-2.0
"""Questions in Spec-Bench's format: read from a path or a URL, checked, sampled, put into batches."""

from __future__ import annotations

import hashlib
import http.client
import json
import random
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

from ..storage.reading import reading

TASKS = ("mt_bench", "translation", "summarization", "qa", "math_reasoning", "rag")
MT_BENCH = ("writing", "roleplay", "reasoning", "math", "coding", "extraction", "stem", "humanities")
TITLES = {
    "mt_bench": "MT-bench",
    "translation": "Translation",
    "summarization": "Summarization",
    "qa": "QA",
    "math_reasoning": "Math",
    "rag": "RAG",
}
WHERE = "the file question.jsonl of the Spec-Bench repository (github.com/hemingkx/Spec-Bench), a path or its URL"
_TIMEOUT = 60.0


@dataclass(frozen=True)
class Question:
    """One question.

    Attributes:
        question_id: of the question in its file.
        category: as the file names it.
        task: the task the category belongs to; a category of the user's own is its own task.
        turns: what the user says, one or several times.
        references: the reference answers, empty where there is none.
    """

    question_id: str
    category: str
    task: str
    turns: tuple[str, ...]
    references: tuple[str, ...]


@dataclass(frozen=True)
class Group:
    """Questions answered together as one batch.

    Attributes:
        questions: one per row; all of one task and with the same number of turns.
        own: how many of them, from the first, are counted; the rest only fill the batch.
    """

    questions: tuple[Question, ...]
    own: int

    @property
    def name(self) -> str:
        """The ids of all rows, which tells one group from another."""
        return "+".join(question.question_id for question in self.questions)

    @property
    def turns(self) -> int:
        return len(self.questions[0].turns)


def read_source(source: str) -> bytes:
    """The bytes of a file or URL.

    Raises:
        ValueError: it cannot be read.
    """
    if source.startswith(("http://", "https://")):
        try:
            with urllib.request.urlopen(source, timeout=_TIMEOUT) as answer:
                content: bytes = answer.read()
        except (urllib.error.URLError, TimeoutError, OSError, http.client.HTTPException) as error:
            raise ValueError(f"The questions at {source} could not be fetched: {error}.") from error
        return content
    path = Path(source).expanduser()
    if not path.is_file():
        raise ValueError(f"There is no question file {source}; --questions takes {WHERE}.")
    return path.read_bytes()


def read_questions(source: str) -> tuple[list[Question], str]:
    """All questions of a file.

    Args:
        source: path or URL of JSON lines with `question_id`, `category`, `turns` and maybe `reference`.

    Returns:
        The questions in the file's order, and the SHA-256 of the file.

    Raises:
        ValueError: naming the first line that is not a question, or that there is none.
    """
    content = read_source(source)
    found: list[Question] = []
    seen: set[str] = set()
    with reading(source, f"download it again; --questions takes {WHERE}", "it is not UTF-8 text"):
        text = content.decode("utf-8")
    # Not splitlines: JSON strings may hold the other line separators of Unicode.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        question = _parse(line, f"{source}, line {number}")
        if question.question_id in seen:
            raise ValueError(f"{source}, line {number}: the question_id {question.question_id} occurs twice.")
        seen.add(question.question_id)
        found.append(question)
    if not found:
        raise ValueError(f"{source} holds no questions.")
    return found, hashlib.sha256(content).hexdigest()


def _parse(line: str, where: str) -> Question:
    try:
        fields: Any = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: not JSON ({error.msg}); correct the line, or get the file again.") from None
    if not isinstance(fields, dict):
        raise ValueError(f"{where}: a question is a JSON object, not {type(fields).__name__}.")
    for name in ("question_id", "category", "turns"):
        if name not in fields:
            raise ValueError(f"{where}: the field {name!r} is missing.")
    turns = fields["turns"]
    if not isinstance(turns, list) or not turns or not all(isinstance(turn, str) and turn.strip() for turn in turns):
        raise ValueError(f"{where}: turns must be a list of texts, none of them empty.")
    category = str(fields["category"])
    task = "mt_bench" if category in MT_BENCH else category
    return Question(str(fields["question_id"]), category, task, tuple(turns), tuple(_flatten(fields.get("reference"))))


def _flatten(references: Any) -> list[str]:
    if references is None:
        return []
    if isinstance(references, list):
        return [text for entry in references for text in _flatten(entry)]
    return [str(references)]


def select(
    questions: Sequence[Question], tasks: Sequence[str] | None, limit: int | None, seed: int
) -> dict[str, list[Question]]:
    """The questions to run, by task.

    Args:
        questions: all of them.
        tasks: the tasks wanted, None for all that the file has.
        limit: most questions of a task; which ones is drawn by the seed.
        seed: of that draw.

    Returns:
        The tasks in Spec-Bench's order, each with its questions in the file's order.

    Raises:
        ValueError: a task has no question, or the limit is not positive.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"--limit must be at least 1, got {limit}.")
    there = {question.task for question in questions}
    order = [*(task for task in TASKS if task in there), *sorted(there - set(TASKS))]
    unknown = [task for task in tasks or () if task not in there]
    if unknown:
        raise ValueError(f"--tasks names {unknown[0]!r}, of which there is no question; there are {', '.join(order)}.")
    chosen: dict[str, list[Question]] = {}
    for task in order:
        if tasks is not None and task not in tasks:
            continue
        mine = [question for question in questions if question.task == task]
        if limit is not None and limit < len(mine):
            # Drawn per task, so that a task's questions do not depend on which others are run.
            picked = random.Random(f"{seed}:{task}").sample(range(len(mine)), limit)
            mine = [mine[i] for i in sorted(picked)]
        chosen[task] = mine
    return chosen


def make_groups(chosen: dict[str, list[Question]], batch: int) -> list[Group]:
    """Full batches of questions of one task, the tasks taking turns.

    A last batch that would be too small is filled with the task's first questions, which are not counted again.

    Args:
        chosen: questions by task.
        batch: rows of a batch.
    """
    by_task = []
    for questions in chosen.values():
        groups = []
        for turns in dict.fromkeys(len(question.turns) for question in questions):
            mine = [question for question in questions if len(question.turns) == turns]
            for start in range(0, len(mine), batch):
                own = min(batch, len(mine) - start)
                rows = [mine[(start + i) % len(mine)] for i in range(batch)]
                groups.append(Group(tuple(rows), own))
        by_task.append(groups)
    # Taking turns, so that a run that is stopped early has something of every task.
    return [group for row in zip_longest(*by_task) for group in row if group is not None]
