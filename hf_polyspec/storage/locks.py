# SPDX-License-Identifier: Apache-2.0
"""One writer a folder."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from hf_polyspec.errors import FolderInUseError

from .folders import sweep


@contextlib.contextmanager
def one_writer(folder: str | os.PathLike[str], rank: int = 0, processes: int = 1) -> Iterator[None]:
    """Be the only one, of all threads and processes, who writes into a folder while the block runs.

    The system gives the lock back when the process ends, however it ends; the file `.writer-RANK.lock` that stays
    behind means nothing. What killed writers left half written is deleted on entry.

    Args:
        folder: made if need be.
        rank: of this process, where several share a folder by plan, each with files of its own.
        processes: how many share it; the leftovers of killed ones are then left alone.

    Raises:
        FolderInUseError: someone else is writing into it; at once, without waiting.
        OSError: the folder cannot be written.
    """
    from filelock import FileLock, Timeout

    place = Path(folder)
    place.mkdir(parents=True, exist_ok=True)
    lock = FileLock(place / f".writer-{rank}.lock")
    try:
        try:
            lock.acquire(blocking=False)
        except Timeout:
            raise FolderInUseError(
                f"Another process is writing into {place}: wait until it has ended, or use another folder."
            ) from None
        if processes == 1:
            sweep(place)
        yield
    finally:
        lock.release()  # nothing where it was not acquired
