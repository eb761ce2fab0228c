# SPDX-License-Identifier: Apache-2.0
"""Files that end early, or are full of zeros where their end should be."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from hf_polyspec.errors import DamagedFileError


def cuts(content: bytes, chance: random.Random, some: int = 6) -> list[int]:
    """Lengths at which to cut, one of every kind of boundary: nothing, a byte, around every kind of structure, the end.

    Args:
        content: of the whole file; chance: draws the rest; some: how many are drawn.
    """
    size = len(content)
    found = {0, 1, 2, 7, 8, 9, 16, size // 3, size // 2, size - 9, size - 8, size - 2, size - 1}
    lines = [place for place, byte in enumerate(content) if byte == 0x0A]
    for place in (lines[:2] + lines[-2:]) if lines else ():
        found |= {place, place + 1}
    header = 8 + int.from_bytes(content[:8], "little")  # where a safetensors file's numbers begin
    found |= {header - 1, header, header + 1}
    found |= {chance.randrange(size) for _ in range(some)}
    return sorted(cut for cut in found if 0 <= cut < size)


def damaged(content: bytes, chance: random.Random, some: int = 6, zeros: bool = True) -> Iterator[bytes]:
    """What may be left of a file: its beginning, and (`zeros`) that followed by zeros, as after a loss of power."""
    for cut in cuts(content, chance, some):
        yield content[:cut]
        if zeros:
            yield content[:cut] + bytes(len(content) - cut)


def tear_each(
    path: Path,
    read: Callable[[], Any],
    chance: random.Random,
    *,
    whole: Callable[[Any], bool],
    some: int = 6,
    zeros: bool = True,
) -> int:
    """Damage a file in every way, and see that a reader names it or finds what is right.

    Args:
        path: the file; it is as before in the end.
        read: reads it.
        chance: draws places; some: how many.
        whole: whether what was read without an exception is right.
        zeros: whether files that end in zeros are among the damages.

    Returns:
        How many damages there were.
    """
    content, count = path.read_bytes(), 0
    try:
        for left in damaged(content, chance, some, zeros):
            path.write_bytes(left)
            count += 1
            try:
                found = read()
            except DamagedFileError as error:
                check_told(error, path)
            else:
                assert left == content or whole(found), f"{path.name} of {len(left)} bytes was read as {found!r:.200}"
    finally:
        path.write_bytes(content)
    return count


def check_told(error: DamagedFileError, path: Path) -> None:
    """One sentence that names the file."""
    told = str(error)
    assert path.name in told, told
    assert "\n" not in told, told
    assert len(told) < 600, told
