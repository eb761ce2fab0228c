# SPDX-License-Identifier: Apache-2.0
"""Files that grow by lines: a kill costs at most the line that was being written.

A line counts once its line end is on disk. What stands after the last line end was cut off by a kill or a full disk:
readers pass over it with a note in the log, and writers take it away before they go on.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from hf_polyspec.errors import DamagedFileError

from .atomic import sync_folder

Value = TypeVar("Value")
_WINDOW = 1 << 16
# A log and not a warning: nothing in the caller's code is wrong, and a run goes on.
_LOG = logging.getLogger(__name__)


def append_lines(path: str | os.PathLike[str], lines: Sequence[str], first: str | None = None) -> None:
    """Add lines to a file and wait until they are on disk: all of them, or none where that fails.

    Half a line at the file's end is taken away first, with a note.

    Args:
        path: the file; it and its folder are made if need be. One process at a time (`locks.one_writer`).
        lines: without line ends.
        first: a line that comes before all others when the file is new or empty, such as the head of a table.

    Raises:
        OSError: they cannot be written; the file is then as long as before.
    """
    file = Path(path)
    file.parent.mkdir(parents=True, exist_ok=True)
    new = not file.exists()
    handle = os.open(file, os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0), 0o666)
    try:
        size = _drop_torn(handle, file)
        wanted = [first, *lines] if first is not None and size == 0 else list(lines)
        content = memoryview("".join(f"{line}\n" for line in wanted).encode("utf-8"))
        try:
            os.lseek(handle, size, os.SEEK_SET)
            while content:
                content = content[os.write(handle, content) :]
            os.fsync(handle)
        except BaseException as error:
            os.ftruncate(handle, size)
            if isinstance(error, OSError):  # the system's, which knows no name
                raise OSError(error.errno, os.strerror(error.errno or 0), str(path)) from error
            raise
    finally:
        os.close(handle)
    if new:
        sync_folder(file.parent)


def mend(path: str | os.PathLike[str]) -> None:
    """Take away half a line at a file's end, with a note; a file that is not there stays so. Raises OSError."""
    file = Path(path)
    if not file.exists():
        return
    handle = os.open(file, os.O_RDWR | getattr(os, "O_BINARY", 0))
    try:
        _drop_torn(handle, file)
    finally:
        os.close(handle)


def read_lines(
    path: str | os.PathLike[str],
    parse: Callable[[str], Value] = json.loads,
    remedy: str = "delete that line, or restore the file",
) -> list[Value]:
    """The whole lines of a file that this package writes; half a line at its end is left out, with a note.

    Args:
        path: the file; one that is not there has no lines.
        parse: of one line without its end, JSON unless told; raises ValueError, KeyError or TypeError where it is
            something else. Empty lines are passed over.
        remedy: what a user can do about a line in the middle that is none.

    Raises:
        DamagedFileError: a whole line cannot be parsed; the sentence says which.
        OSError: the file cannot be read.
    """
    file = Path(path)
    try:
        content = file.read_bytes()
    except FileNotFoundError:
        return []
    whole, end, torn = content.rpartition(b"\n")
    if torn:
        _note(file, torn)
    found = []
    for number, line in enumerate(whole.split(b"\n") if end else [], start=1):
        if not line.strip():
            continue
        try:
            found.append(parse(line.decode("utf-8").rstrip("\r")))
        except (ValueError, KeyError, TypeError, IndexError) as error:
            raise DamagedFileError(file, f"line {number} is not what was written: {_short(line)}", remedy) from error
    return found


def _drop_torn(handle: int, file: Path) -> int:
    """Cut a file after its last line end; its size then."""
    size = os.fstat(handle).st_size
    start, tail = size, b""
    while start and b"\n" not in tail:
        step = min(start, _WINDOW)
        start -= step
        os.lseek(handle, start, os.SEEK_SET)
        tail = os.read(handle, step) + tail
    kept = start + tail.rfind(b"\n") + 1
    if kept < size:
        os.ftruncate(handle, kept)
        os.fsync(handle)
        _note(file, tail[kept - start :])
    return kept


def _note(file: Path, torn: bytes) -> None:
    _LOG.warning("%s ended in half a line, cut off by a kill or a full disk; it is dropped: %s", file, _short(torn))


def _short(line: bytes) -> str:
    text = repr(line.decode("utf-8", "replace"))
    return text if len(text) <= 60 else text[:57] + "..."
