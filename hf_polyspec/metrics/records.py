# SPDX-License-Identifier: Apache-2.0
"""Bench outputs as JSON lines, read and checked before anything is scored."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Record:
    """One generated turn.

    Attributes:
        question_id: of the question in its file.
        category: as the question file names it.
        task: the benchmark task the category belongs to.
        method: how the text was decoded.
        temperature: 0 for greedy decoding.
        turn: 0 for the first answer of a dialogue.
        output: the generated text.
        output_ids: the generated token ids.
        references: the reference answers, empty where the question has none.
    """

    question_id: str
    category: str
    task: str
    method: str
    temperature: float
    turn: int
    output: str
    output_ids: tuple[int, ...]
    references: tuple[str, ...]


def read_records(paths: Iterable[Path]) -> tuple[list[Record], list[str]]:
    """Read bench output files, one JSON object a line, several files as one run.

    Args:
        paths: the files; those of several processes are simply given together.

    Returns:
        The records, and a sentence for each file whose last line was cut off by a killed run.

    Raises:
        ValueError: naming file and line of the first record that cannot be read, or that there is none.
    """
    records: list[Record] = []
    notes: list[str] = []
    for path in paths:
        # Bytes: a line may have been cut off in the middle of a character.
        lines = path.read_bytes().split(b"\n")
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                fields = json.loads(line)
            except ValueError as error:
                if number == len(lines):  # no newline after it: the run was killed while writing
                    notes.append(f"{path.name}: the last line is cut off and was left out.")
                    continue
                what = getattr(error, "msg", "not UTF-8")
                raise ValueError(
                    f"{path.name}, line {number}: not JSON ({what}); delete the line and run the same polyspec bench "
                    "again, which answers that question anew."
                ) from None
            records.append(parse_record(fields, f"{path.name}, line {number}"))
    if not records:
        raise ValueError("There are no records to score.")
    return records, notes


def parse_record(fields: Any, where: str) -> Record:
    """Check one JSON object and turn it into a `Record`.

    Args:
        fields: the decoded line.
        where: named in error messages.

    Returns:
        The record; nested reference lists (as in Spec-Bench's RAG questions) are flattened.

    Raises:
        ValueError: naming the field that is missing or of the wrong kind.
    """
    if not isinstance(fields, dict):
        raise ValueError(f"{where}: a record is a JSON object, not {type(fields).__name__}.")
    for name in ("question_id", "task", "method", "temperature", "output", "output_ids"):
        if name not in fields:
            raise ValueError(f"{where}: the field {name!r} is missing.")
    temperature, ids = fields["temperature"], fields["output_ids"]
    if not _is_number(temperature) or not math.isfinite(temperature) or temperature < 0:
        raise ValueError(f"{where}: temperature must be a number of at least 0, not {temperature!r}.")
    if not isinstance(fields["output"], str):
        raise ValueError(f"{where}: output must be a string, not {type(fields['output']).__name__}.")
    if not isinstance(ids, list) or not all(isinstance(i, int) and not isinstance(i, bool) for i in ids):
        raise ValueError(f"{where}: output_ids must be a list of integers.")
    turn = fields.get("turn", 0)
    if not isinstance(turn, int):
        raise ValueError(f"{where}: turn must be an integer, not {turn!r}.")
    return Record(
        question_id=str(fields["question_id"]),
        category=str(fields.get("category", fields["task"])),
        task=str(fields["task"]),
        method=str(fields["method"]),
        temperature=float(temperature),
        turn=turn,
        output=fields["output"],
        output_ids=tuple(ids),
        references=tuple(_flatten(fields.get("references"), where)),
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _flatten(references: Any, where: str) -> list[str]:
    if references is None:
        return []
    if isinstance(references, str):
        return [references]
    if isinstance(references, list):
        return [text for entry in references for text in _flatten(entry, where)]
    raise ValueError(f"{where}: references must be strings, not {type(references).__name__}.")
