# SPDX-License-Identifier: Apache-2.0
"""Calls in a forked process: killed at every place, or short of disk."""

from __future__ import annotations

import ctypes
import os
import resource
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .interrupts import Where, at_place, in_package

KILLED, FAILED = 9, 1


def in_child(call: Callable[[], Any]) -> tuple[int, str]:
    """Run a call in a forked process, which ends as a killed one does: nothing is flushed, no cleaning up is done.

    Returns:
        The exit code (0, `KILLED`, `FAILED` with an exception, or minus a signal), and what it said of an exception.
    """
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        code = 0
        try:
            call()
        except BaseException as error:
            told = "".join(traceback.format_exception_only(type(error), error))
            os.write(writer, f"{type(error).__name__} {getattr(error, 'errno', None)} {told}"[:4000].encode())
            code = FAILED
        os._exit(code)
    os.close(writer)
    told = b""
    while part := os.read(reader, 1 << 16):
        told += part
    os.close(reader)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), told.decode("utf-8", "replace")


def kill_each(
    call: Callable[[], Any],
    check: Callable[[], Any],
    every: int = 1,
    *,
    prepare: Callable[[], Any] = lambda: None,
    where: Where = in_package,
    first: int = 0,
) -> int:
    """Kill a process at every n-th line of a call, and check what it left each time.

    Args:
        call: run in a process of its own, once for every place and once to its end.
        check: raises where something is wrong; called in this process, after every run.
        every: lines from one kill to the next.
        prepare: called before every run; where: whose lines count; first: the first place.

    Returns:
        How many kills there were.
    """
    count, place = 0, first
    while True:
        prepare()
        code, told = in_child(lambda place=place: at_place(call, place, _die, where))  # type: ignore[misc]
        if code not in (0, KILLED):
            raise AssertionError(f"The process to be killed at place {place} failed: {told}")
        check()
        if code == 0:
            return count
        count += 1
        place += every


def _die() -> None:
    os._exit(KILLED)


def on_a_full_disk(call: Callable[[], Any], room: int) -> tuple[int, str]:
    """Run a call in a process none of whose files may grow beyond `room` bytes; see `in_child`."""

    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, room))
        call()

    return in_child(limited)


@contextmanager
def small_disk(place: Path, size: int) -> Iterator[bool]:
    """A file system of `size` bytes at an empty folder, where this process may mount one; whether it may."""
    mount = ctypes.CDLL(None, use_errno=True)
    if not sys.platform.startswith("linux"):
        yield False
        return
    made = mount.mount(b"tmpfs", os.fsencode(place), b"tmpfs", 0, f"size={size}".encode()) == 0
    try:
        yield made
    finally:
        if made:
            mount.umount2(os.fsencode(place), 2)
