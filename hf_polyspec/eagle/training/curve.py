# SPDX-License-Identifier: Apache-2.0
"""The files a run writes as it goes: the loss curve and the validations."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from hf_polyspec.storage.atomic import write_text
from hf_polyspec.storage.lines import append_lines, read_lines

_REMEDY = "delete that line, or the file if the curve does not matter, and give the same command again"


def append_row(path: Path, row: dict[str, float]) -> None:
    """Adds a line to the curve.

    Args:
        path: the CSV file; it gets a header when it is new.
        row: names and numbers, the same names every time.
    """
    append_lines(path, [_joined(row.values())], first=_joined(row))


def read_curve(path: Path) -> list[dict[str, str]]:
    """The rows of the curve, in the words of the file; half a last line, which a kill left, is not among them.

    Args:
        path: the CSV file; none there has no rows.

    Raises:
        DamagedFileError: a line in the middle is no row; the sentence says which.
    """
    header: list[str] = []

    def parse(line: str) -> list[str]:
        values = next(csv.reader([line]))
        if not header:
            header.extend(values)
            return values
        if len(values) != len(header):
            raise ValueError(f"{len(values)} values under {len(header)} names")
        for value in values:
            float(value)
        return values

    lines = read_lines(path, parse, _REMEDY)
    return [dict(zip(header, values, strict=True)) for values in lines[1:]]


def read_validations(path: Path) -> list[dict[str, Any]]:
    """The validations so far, in order; half a last line, which a kill left, is not among them.

    Args:
        path: the JSON lines file; none there has no validations.

    Raises:
        DamagedFileError: a line in the middle is no validation; the sentence says which.
    """
    return read_lines(path, _validation, _REMEDY)


def put_validation(path: Path, record: dict[str, Any]) -> None:
    """Adds a validation, in place of an earlier one after the same step.

    Args:
        path: the JSON lines file.
        record: with the `step` it was made after.
    """
    kept = [earlier for earlier in read_validations(path) if earlier["step"] != record["step"]]
    _write_validations(path, [*kept, record])


def forget_after(folder: Path, step: int) -> None:
    """Forgets what was written after a checkpoint, so that the curve goes on without a fold.

    Args:
        folder: of the run.
        step: the checkpoint's optimizer step.

    Raises:
        DamagedFileError: a line in the middle of one of the files is none; the sentence says which.
    """
    curve, validation = folder / "curve.csv", folder / "validation.jsonl"
    if curve.exists():
        kept = [row for row in read_curve(curve) if int(row["step"]) <= step]
        if kept:
            lines = [_joined(kept[0]), *(_joined(row.values()) for row in kept)]
            write_text(curve, "".join(f"{line}\n" for line in lines))
        else:
            curve.unlink()
    if validation.exists():
        _write_validations(validation, [found for found in read_validations(validation) if found["step"] <= step])


def tracker_values(found: dict[str, dict[str, object]]) -> dict[str, float]:
    """Names and numbers for a tracker.

    Args:
        found: acceptance by kind of text, see `Acceptance.as_dict`.
    """
    values: dict[str, float] = {}
    for kind, facts in found.items():
        for name, fact in facts.items():
            items: list[Any] = fact if isinstance(fact, list) else [fact]
            for index, value in enumerate(items):
                suffix = f"_{index}" if isinstance(fact, list) else ""
                values[f"validation/{kind}/{name}{suffix}"] = float(value)
    return values


def _joined(values: Iterable[Any]) -> str:
    """One line of CSV without its end."""
    line = io.StringIO()
    csv.writer(line, lineterminator="").writerow(values)
    return line.getvalue()


def _validation(line: str) -> dict[str, Any]:
    record: dict[str, Any] = json.loads(line)
    record["step"] + 0  # so that a record without a step, or anything else, is no validation
    return record


def _write_validations(path: Path, records: list[dict[str, Any]]) -> None:
    write_text(path, "".join(f"{json.dumps(record)}\n" for record in records))
