# SPDX-License-Identifier: Apache-2.0
"""Memory for keys and values `[B, H, capacity, D]` with more columns than are held."""

from __future__ import annotations

from collections.abc import Sequence

import torch

_SPARE = 128
"""Columns that a buffer has beyond what it is to hold, at least: most answers are no longer."""


def whole(states: torch.Tensor | None) -> torch.Tensor | None:
    """What others set as a buffer; transformers begins with a tensor of no shape."""
    return states.contiguous() if states is not None and states.dim() == 4 else None


def alike(buffer: torch.Tensor, shape: Sequence[int]) -> bool:
    """Whether a buffer differs from keys of a shape `(B, H, F, D)` only in the number of columns."""
    batch, heads, _, size = buffer.shape
    return (batch, heads, size) == (shape[0], shape[1], shape[3])


def with_room(buffer: torch.Tensor | None, shape: Sequence[int], like: torch.Tensor, start: int) -> torch.Tensor:
    """The buffer itself if keys or values of a shape fit behind `start` columns, else a larger one with those."""
    batch, heads, fed, size = shape
    end = start + fed
    if buffer is not None and not start and (buffer.dtype is not like.dtype or not alike(buffer, shape)):
        buffer = None  # of an earlier batch, and empty by now
    if buffer is not None and end <= buffer.shape[2]:
        return buffer
    larger = like.new_empty(batch, heads, _capacity(end), size)
    if buffer is not None:
        larger[:, :, :start] = buffer[:, :, :start]
    return larger


def buffers(count: int, shape: Sequence[int], like: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Buffers of keys and of values for so many layers of which none holds anything, in one piece of memory.

    Args:
        shape: of what is to be written first, `(B, H, F, D)`; like: has the dtype and the device.
    """
    batch, heads, fed, size = shape
    made = like.new_empty(2 * count, batch, heads, _capacity(fed), size).unbind()
    return list(zip(made[:count], made[count:], strict=True))


def _capacity(columns: int) -> int:
    return columns + max(_SPARE, columns // 2)
