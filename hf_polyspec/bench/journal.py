# SPDX-License-Identifier: Apache-2.0
"""The folder of a run: lines that survive a kill, and settings that a resumed run must share."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..storage.atomic import create_text, write_text
from ..storage.lines import append_lines, mend
from ..storage.lines import read_lines as whole_lines
from ..storage.reading import read_json

Line = dict[str, Any]
SETTINGS = "settings.json"
_REMEDY = "delete that line, and the same command makes it anew"


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
        mend(self.path)
        there = whole_lines(self.path, _line, _REMEDY)
        kept = complete(there)
        if len(kept) < len(there):
            write_text(self.path, "".join(f"{_dump(line)}\n" for line in kept))
        return read_lines(self.folder, self.stem)

    def append(self, lines: Sequence[Line]) -> None:
        """Write lines in one piece and wait until they are on disk."""
        append_lines(self.path, [_dump(line) for line in lines])


def read_lines(folder: Path, stem: str) -> list[Line]:
    """The lines of all processes; torn ones and those of interrupted batches are left out.

    Raises:
        DamagedFileError: a file holds something else than JSON lines.
    """
    files = sorted(folder.glob(f"{stem}-*.jsonl"))
    return complete([line for file in files for line in whole_lines(file, _line, _REMEDY)])


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
    wanted = json.loads(json.dumps(settings))
    create_text(folder / SETTINGS, json.dumps(wanted, indent=2, ensure_ascii=False) + "\n")
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
        ValueError: there is no run. DamagedFileError: the file that says so cannot be read.
    """
    path = folder / SETTINGS
    if not path.is_file():
        raise ValueError(f"{folder} holds no run of polyspec bench.")
    found: dict[str, Any] = read_json(path, remedy="delete the folder, or put the file back")
    return found


def _line(text: str) -> Line:
    line = json.loads(text)
    if not isinstance(line, dict):
        raise TypeError
    return line


def _dump(line: Line) -> str:
    return json.dumps(line, ensure_ascii=False, allow_nan=False)


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 200 else text[:197] + "..."
