# SPDX-License-Identifier: Apache-2.0
"""Memory for matrices that are read from one end to the other in every pass: in large pages, one behind the other.

At the speed of the memory a page of four kilobytes lasts a tenth of a microsecond, and behind it the processor's own
reading ahead begins anew. Linux gives pages of two megabytes to whoever asks for them.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable
from threading import Lock
from weakref import ref

import torch
from torch import Tensor

from .panels import LINE

CHUNK = 32 << 20
"""Bytes that are asked of the system at once, at least, and given back once nothing lies in them any more."""
WORTH = 1 << 16
"""Smaller matrices lie wherever there is room."""


def _nothing() -> None:
    return None


_lock = Lock()
_chunk: Callable[[], mmap.mmap | None] = _nothing
"""The last chunk, as long as something lies in it."""
_used = 0


def laid_out(matrix: Tensor) -> Tensor:
    """The same numbers in such memory; the matrix itself where there is none."""
    size = matrix.nbytes
    if size < WORTH or not hasattr(mmap, "MADV_HUGEPAGE"):
        return matrix
    matrix = matrix.contiguous()
    try:
        chunk, start = _place(size)
    except (OSError, ValueError):
        return matrix
    found = torch.frombuffer(chunk, dtype=torch.uint8, count=size, offset=start).view(matrix.dtype).view(matrix.shape)
    return found.copy_(matrix)


def _place(size: int) -> tuple[mmap.mmap, int]:
    """A stretch of so many bytes that nobody else gets."""
    global _chunk, _used
    with _lock:
        chunk = _chunk()
        if chunk is None or _used + size > len(chunk):
            # This process's own: a forked one goes on in a copy of it, and shared memory has no large pages mostly.
            chunk = mmap.mmap(-1, max(CHUNK, size), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            chunk.madvise(mmap.MADV_HUGEPAGE)
            _chunk, _used = ref(chunk), 0
        start, _used = _used, _used + (size + LINE - 1) // LINE * LINE
        return chunk, start
