# SPDX-License-Identifier: Apache-2.0
"""The folder of a run: lines that survive a kill, and settings that a resumed run must share."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

Line = dict[str, Any]
SETTINGS = "settings.json"


class Journal:
    """JSON lines of one kind, a file for each process; every line is on disk before the next is made.

    Args:
        folder: of the run; made if it is not there.
        stem: what the lines are; the files are `<stem>-<rank>.jsonl`.
        rank: of this process.
    """

    def __init__(self, folder: Path, stem: str, rank: int = 0) -> None:
        self.folder, self.stem = folder, stem
        self.path = folder / f"{stem}-{rank}.jsonl"

    def open(self) -> list[Line]:
        """Drop the end of a line that a kill cut off, and of a batch that it interrupted; returns all lines."""
        self.folder.mkdir(parents=True, exist_ok=True)
        if self.path.exists():
            kept = complete(_parse(self.path))
            _replace(self.path, "".join(_dump(line) for line in kept))
        return read_lines(self.folder, self.stem)

    def append(self, lines: Sequence[Line]) -> None:
        """Write lines in one piece and wait until they are on disk."""
        with open(self.path, "ab") as file:
            file.write("".join(_dump(line) for line in lines).encode("utf-8"))
            file.flush()
            os.fsync(file.fileno())


def read_lines(folder: Path, stem: str) -> list[Line]:
    """The lines of all processes; torn ones and those of interrupted batches are left out.

    Raises:
        ValueError: a file holds something else than JSON lines.
    """
    files = sorted(folder.glob(f"{stem}-*.jsonl"))
    return complete([line for file in files for line in _parse(file)])


def complete(lines: Iterable[Line]) -> list[Line]:
    """The lines of batches all of whose rows are there, each once."""
    found: dict[tuple[Any, ...], Line] = {}
    rows: dict[tuple[Any, ...], int] = {}
    for line in lines:
        unit = unit_of(line)
        key = (*unit, line.get("row", 0))
        if key not in found:
            found[key] = line
            rows[unit] = rows.get(unit, 0) + 1
    return [line for line in found.values() if rows[unit_of(line)] == line.get("own", 1)]


def unit_of(line: Line) -> tuple[Any, ...]:
    """What is never done twice: one batch, answered by one method at one temperature, in one turn."""
    return (line.get("method"), line.get("temperature"), line.get("group"), line.get("turn"))


def write_settings(folder: Path, settings: Mapping[str, Any]) -> None:
    """Put down what a run was made with, or check it against what was put down.

    Args:
        folder: of the run.
        settings: by the name under which the user gave them.

    Raises:
        ValueError: the run in the folder was made with another setting; the sentence names it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / SETTINGS
    wanted = json.loads(json.dumps(settings))
    text = json.dumps(wanted, indent=2, ensure_ascii=False) + "\n"
    if not path.exists():
        handle, name = tempfile.mkstemp(dir=folder)
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.chmod(name, 0o644)
        try:
            # A link is made whole or not at all, and not twice: processes that start together agree on one.
            with contextlib.suppress(FileExistsError):
                os.link(name, path)
        finally:
            os.unlink(name)
    found = read_settings(folder)
    for name in [*wanted, *(name for name in found if name not in wanted)]:
        if found.get(name) != wanted.get(name):
            raise ValueError(
                f"The run in {folder} was made with {name} = {_short(found.get(name))}, and this one has "
                f"{_short(wanted.get(name))}; use the same setting to go on with it, or another folder."
            )


def read_settings(folder: Path) -> dict[str, Any]:
    """What the run in a folder was made with.

    Raises:
        ValueError: there is no run.
    """
    path = folder / SETTINGS
    if not path.is_file():
        raise ValueError(f"{folder} holds no run of polyspec bench.")
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file whole or not at all."""
    _replace(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def write_text(path: Path, content: str) -> None:
    """Write a text file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    _replace(path, content)


def _replace(path: Path, text: str) -> None:
    handle, name = tempfile.mkstemp(dir=path.parent)
    with os.fdopen(handle, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.chmod(name, 0o644)
    os.replace(name, path)


def _dump(line: Line) -> str:
    return json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n"


def _parse(path: Path) -> list[Line]:
    lines: list[Line] = []
    pieces = path.read_bytes().split(b"\n")
    for number, piece in enumerate(pieces, start=1):
        try:
            line = json.loads(piece) if piece.strip() else None
        except ValueError:
            if number == len(pieces):  # no newline after it: cut off by a kill
                break
            raise ValueError(f"{path.name}, line {number}: not JSON.") from None
        if line is not None and number < len(pieces):
            lines.append(line)
    return lines


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 200 else text[:197] + "..."
