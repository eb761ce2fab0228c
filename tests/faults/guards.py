# SPDX-License-Identifier: Apache-2.0
"""Memory between pages that nobody may touch: a function that reads or writes past its buffers dies by SIGSEGV."""

from __future__ import annotations

import ctypes
import mmap
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

PAGE = mmap.PAGESIZE
_LIBC = ctypes.CDLL(None, use_errno=True)
_LIBC.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_KEPT: list[Any] = []


def fenced(shape: tuple[int, ...], dtype: torch.dtype, *, after: bool) -> Tensor:
    """A contiguous tensor with a forbidden page right behind its last byte, or right before its first.

    Args:
        shape, dtype: of it; its numbers are not set.
        after: which of the two; the other side has room up to the next page. Behind, the tensor begins wherever its
            size puts it, as a view of a larger one may.
    """
    size = dtype.itemsize
    for length in shape:
        size *= length
    pages = -(-size // PAGE) or 1
    memory = mmap.mmap(-1, (pages + 2) * PAGE)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    for guard in (start, start + (pages + 1) * PAGE):
        if _LIBC.mprotect(guard, PAGE, 0) != 0:
            raise OSError(ctypes.get_errno(), "mprotect")
    offset = PAGE + (pages * PAGE - size if after else 0)
    _KEPT.append(memory)
    if not size:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(memory, dtype=torch.uint8, count=size, offset=offset).view(dtype).view(shape)


def moved(tensor: Tensor, *, after: bool) -> Tensor:
    """A contiguous copy of a tensor in such memory."""
    made = fenced(tuple(tensor.shape), tensor.dtype, after=after)
    made.copy_(tensor)
    return made


def free() -> None:
    """Let go of all such memory made so far, none of which may be used again."""
    _KEPT.clear()


class Fence(TorchFunctionMode):
    """While it is entered, what torch allocates without setting its numbers lies between forbidden pages.

    Args:
        after: see `fenced`.
    """

    def __init__(self, after: bool) -> None:
        super().__init__()
        self._after = after

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = function(*args, **(kwargs or {}))
        if function in (torch.empty, torch.empty_like, Tensor.new_empty) and made.is_contiguous():
            return fenced(tuple(made.shape), made.dtype, after=self._after)
        return made
