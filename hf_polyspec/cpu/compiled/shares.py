# SPDX-License-Identifier: Apache-2.0
"""Which part of a product a thread does next: those of its own share, one after another, then what others have left.

A share is one stretch of memory. The memory brings what lies in a row at its full speed, and with every change of place
it begins anew: a pass over one token of a model of 106 million bytes took half as long again with parts that went to
whoever came first. Taking what others have left makes up for cores that are slower or busy.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numba import carray, njit

from .tasks import count, pointer, take

ROOM, COUNTERS = 16, 17
"""Where in a stage's task stand how many threads there are counters for, and the address of the first."""
ANYBODY = -1
"""A thread without a share: parts go to whoever comes first."""


@njit
def next_part(task: Any, me: Any, threads: Any, parts: Any) -> Any:
    """The number of a part that nobody else gets; `parts` or more once there is none left.

    Args:
        me: which of `threads` threads this one is, or `ANYBODY`.
    """
    if me == ANYBODY:
        return take(task)
    numbers = carray(pointer(task, np.int64(0)), 18)
    if threads > numbers[ROOM]:
        return take(task)
    for turn in range(threads):
        whose = (me + turn) % threads
        part = whose * parts // threads + count(numbers[COUNTERS] + 8 * whose)
        if part < (whose + 1) * parts // threads:
            return part
    return parts


class Shares:
    """Counters of what has been taken of shares, of stages of tasks.

    Args:
        stages: how many.

    Attributes:
        room: how many threads they are for.
    """

    def __init__(self, stages: int) -> None:
        self.room = torch.get_num_threads()
        self._counters = np.zeros((stages, self.room), np.int64)

    def addresses(self) -> Any:
        """Of the first counter of each stage."""
        return self._counters.ctypes.data + self._counters.strides[0] * np.arange(len(self._counters))

    def clear(self) -> None:
        """Nothing has been taken."""
        self._counters[:] = 0
