# SPDX-License-Identifier: Apache-2.0
"""The files a run writes as it goes: the loss curve and the validations."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any


def append_row(path: Path, row: dict[str, float]) -> None:
    """Adds a line to the curve.

    Args:
        path: the CSV file; it gets a header when it is new.
        row: names and numbers, the same names every time.
    """
    new = not path.exists()
    with path.open("a", newline="", encoding="utf-8") as handle:
        writer = csv.DictWriter(handle, list(row))
        if new:
            writer.writeheader()
        writer.writerow(row)


def put_validation(path: Path, record: dict[str, Any]) -> None:
    """Adds a validation, in place of an earlier one after the same step.

    Args:
        path: the JSON lines file.
        record: with the `step` it was made after.
    """
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    kept = [line for line in lines if json.loads(line)["step"] != record["step"]]
    path.write_text("".join(f"{line}\n" for line in [*kept, json.dumps(record)]), encoding="utf-8")


def forget_after(folder: Path, step: int) -> None:
    """Forgets what was written after a checkpoint, so that the curve goes on without a fold.

    Args:
        folder: of the run.
        step: the checkpoint's optimizer step.
    """
    curve, validation = folder / "curve.csv", folder / "validation.jsonl"
    if curve.exists():
        lines = curve.read_text(encoding="utf-8").splitlines(keepends=True)
        header, lines = lines[:1], lines[1:]
        kept = [line for line in lines if int(line.split(",", 1)[0]) <= step]
        curve.write_text("".join(header + kept), encoding="utf-8") if kept else curve.unlink()
    if validation.exists():
        lines = validation.read_text(encoding="utf-8").splitlines(keepends=True)
        kept = [line for line in lines if json.loads(line)["step"] <= step]
        validation.write_text("".join(kept), encoding="utf-8")


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
