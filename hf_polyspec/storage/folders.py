# SPDX-License-Identifier: Apache-2.0
"""Several files that make sense together only: nobody finds some of them and takes them for all."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

from .atomic import PARTIAL, sync, sync_folder

_FILLING = f".filling{PARTIAL}"


@contextlib.contextmanager
def filling(
    folder: str | os.PathLike[str], last: Sequence[str] = ("config.json",), replaces: Sequence[str] = ()
) -> Iterator[Path]:
    """A folder to write into, whose files move into `folder` when the block ends well, those in `last` at the end.

    A reader who looks for a file in `last` first finds either all files of one writing or none: before the others
    move, those of an earlier writing are taken away in the opposite order. Other files of the folder stay. Files get
    the mode that the umask leaves, also where a library made them readable by their owner alone.

    Args:
        folder: made if need be.
        last: names that mark the whole as whole; the last one moves last.
        replaces: patterns of an earlier writing's files to be deleted even where the new one has no such file, such
            as shards.

    Raises:
        OSError: something cannot be written, a full disk included; the folder is then as it was unless the moves had
            begun, and without its `last` files if they had.
    """
    wanted = Path(folder)
    wanted.mkdir(parents=True, exist_ok=True)
    place = wanted / _FILLING
    shutil.rmtree(place, ignore_errors=True)  # a kill's
    place.mkdir()
    try:
        yield place
        made = sorted(path.relative_to(place) for path in place.rglob("*") if path.is_file())
        _settle(place, made)
        for mark in reversed(last):
            (wanted / mark).unlink(missing_ok=True)
        sync_folder(wanted)
        for pattern in replaces:
            for old in wanted.glob(pattern):
                old.unlink()
        order = {name: number for number, name in enumerate(last)}
        for name in sorted(made, key=lambda name: order.get(str(name), -1)):
            if str(name) in order:
                sync_folder(wanted)  # the others are there for good before what vouches for them
            (wanted / name).parent.mkdir(parents=True, exist_ok=True)
            os.replace(place / name, wanted / name)
        sync_folder(wanted)
    finally:
        shutil.rmtree(place, ignore_errors=True)


def put_folder(made: str | os.PathLike[str], wanted: str | os.PathLike[str]) -> None:
    """Move a finished folder to its place, in place of one that is there.

    Args:
        made: on the same file system; its files are forced to disk first, and get the mode that the umask leaves.
        wanted: a kill between two renames leaves it absent, and the old one beside it under `.NAME.XXXXXXXX.partial`.

    Raises:
        OSError: it cannot be moved.
    """
    source, goal = Path(made), Path(wanted)
    _settle(source, sorted(path.relative_to(source) for path in source.rglob("*") if path.is_file()))
    for path in (*(path for path in source.rglob("*") if path.is_dir()), source):
        sync_folder(path)
    goal.parent.mkdir(parents=True, exist_ok=True)
    aside = goal.parent / f".{goal.name}.{secrets.token_hex(4)}{PARTIAL}"
    if goal.exists():
        os.replace(goal, aside)
    try:
        os.replace(source, goal)
    except OSError:
        if aside.exists():
            os.replace(aside, goal)
        raise
    sync_folder(goal.parent)
    shutil.rmtree(aside, ignore_errors=True)


def sweep(folder: str | os.PathLike[str]) -> None:
    """Delete what killed writers left in a folder; for its one writer only."""
    for path in Path(folder).glob(f".*{PARTIAL}"):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def _settle(place: Path, made: Sequence[Path]) -> None:
    """Set modes and force all to disk."""
    probe = place / f".mode{PARTIAL}"
    os.close(os.open(probe, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
    mode = probe.stat().st_mode & 0o666
    probe.unlink()
    for name in made:
        path = place / name
        path.chmod((path.stat().st_mode & 0o7111) | mode)
        sync(path)
