# SPDX-License-Identifier: Apache-2.0
"""Where tensors lie: compiled functions take addresses, and nothing but what is asked here stands behind them.

A tensor's shape does not say that there is memory for it: FSDP takes the memory of weights away between passes
(`untyped_storage().resize_(0)`) and leaves the shape.
"""

from __future__ import annotations

from torch import Tensor


def held(tensor: Tensor, count: int | None = None) -> bool:
    """Whether this machine's memory holds so many numbers from a tensor's first on; None: all of a contiguous one."""
    size = tensor.nbytes if count is None else count * tensor.itemsize
    begin = int(tensor.storage_offset())
    if begin:
        size += begin * tensor.itemsize
    return tensor.is_cpu and tensor.untyped_storage().nbytes() >= size


def address(tensor: Tensor, name: str, count: int | None = None) -> int:
    """Where a tensor's numbers begin.

    Args:
        tensor: Given by somebody else; what was allocated here needs no look.
        name: For the error.
        count: Numbers that are read from there on, all of a contiguous tensor if None.

    Raises:
        RuntimeError: The memory is elsewhere, or less than the tensor's shape says.
    """
    if not held(tensor, count):
        raise RuntimeError(
            f"The {name} {tuple(tensor.shape)} on {tensor.device} have {tensor.untyped_storage().nbytes()} bytes of "
            "memory, fewer than are to be read: their storage was resized, or lies elsewhere."
        )
    return tensor.data_ptr()
