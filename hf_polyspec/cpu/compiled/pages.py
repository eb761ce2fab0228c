# SPDX-License-Identifier: Apache-2.0
"""Memory for matrices that are read from one end to the other in every pass: in large pages, one behind the other.

A page of four kilobytes ends every fortieth of a microsecond at the speed of the memory, and there a stream begins
anew. Linux gives pages of two megabytes to whoever asks for them.
"""

from __future__ import annotations

import mmap
from threading import Lock

import torch
from torch import Tensor

LINE = 64
CHUNK = 32 << 20
"""Bytes that are asked of the system at once, at least; given back once nothing lies in them any more."""
WORTH = 1 << 16
"""Smaller matrices lie wherever there is room."""

_lock = Lock()
_chunk: mmap.mmap | None = None
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
        if _chunk is None or _used + size > len(_chunk):
            _chunk, _used = mmap.mmap(-1, max(CHUNK, size)), 0
            _chunk.madvise(mmap.MADV_HUGEPAGE)
        start, _used = _used, _used + (size + LINE - 1) // LINE * LINE
        return _chunk, start
