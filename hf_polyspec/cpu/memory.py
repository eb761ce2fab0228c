# SPDX-License-Identifier: Apache-2.0
"""How much memory a second copy of some weights may take: the machine's, or what a container leaves of it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

_GROUPS = Path("/sys/fs/cgroup")
_MEMBERSHIP = Path("/proc/self/cgroup")
_KEEPS = 0.01
"""Seconds for which one look at the memory serves everybody who asks: 120 matrices of a pass, say."""
_SPARE, _SPARE_AT_MOST = 1 / 16, 1 << 30
"""Share of all memory, and bytes, that stay free for others."""


@dataclass
class Memory:
    """Bytes.

    Attributes:
        available: that can be had without swapping; total: there are.
    """

    available: int
    total: int


def memory() -> Memory:
    """What this process can have: of the machine, and of every control group (container) that it lives in."""
    machine = psutil.virtual_memory()
    found = Memory(int(machine.available), int(machine.total))
    for limit, used in _limits():
        found.total = min(found.total, limit)
        found.available = min(found.available, max(0, limit - used))
    return found


def _limits() -> Iterator[tuple[int, int]]:
    """Limit, and bytes used that cannot be given back at once, of every control group around this process."""
    try:
        lines = _MEMBERSHIP.read_text(encoding="utf-8").splitlines()
    except OSError:  # not on Linux
        return
    for line in lines:
        _, controllers, place = line.split(":", 2)
        if controllers == "":
            yield from _of_group(_GROUPS, place, ("memory.max", "memory.current", "inactive_file"))
        elif "memory" in controllers.split(","):
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
            yield from _of_group(_GROUPS / "memory", place, names)


def _of_group(root: Path, place: str, names: tuple[str, str, str]) -> Iterator[tuple[int, int]]:
    """A group and all above it. In a container the group's own path often is not to be seen, but its folder is."""
    limit, usage, cached = names
    own = root / place.lstrip("/")
    for folder in (own, *own.parents):
        if folder != root and root not in folder.parents:
            return
        try:
            most = int((folder / limit).read_text(encoding="utf-8"))
            used = int((folder / usage).read_text(encoding="utf-8"))
            stated = (folder / "memory.stat").read_text(encoding="utf-8").split()
        except (OSError, ValueError):  # no such file, or "max"
            continue
        kept = dict(zip(stated[::2], stated[1::2], strict=False)).get(cached, "0")
        yield most, used - int(kept)


class _Look:
    """The last look at the memory, less what has been granted since."""

    def __init__(self) -> None:
        self._at, self._seen = float("-inf"), Memory(0, 0)

    def now(self) -> Memory:
        began = time.monotonic()
        if began - self._at > _KEEPS:
            self._at, self._seen = began, memory()
        return self._seen


_look = _Look()


def spare() -> int:
    """Bytes that stay free for others when copies are made for speed."""
    return min(int(_look.now().total * _SPARE), _SPARE_AT_MOST)


def grant(size: int) -> bool:
    """Whether so many bytes may be taken; they count as taken then."""
    seen = _look.now()
    if seen.available - size < spare():
        return False
    seen.available -= size
    return True


def half_stays_free(size: int) -> bool:
    """Whether half of all memory stays free after taking so many bytes."""
    seen = memory()
    return seen.available - size > seen.total / 2
