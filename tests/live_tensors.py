# SPDX-License-Identifier: Apache-2.0
"""How many tensors are alive, but for the work buffers of packed models, which are bounded by themselves."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import torch

from hf_polyspec.cpu.compiled.whole_stack import StackTask


def live_tensors() -> tuple[int, int]:
    """How many there are, and their elements.

    A packed model keeps buffers for as many lengths of inputs as have room in a fixed number of rows: which lengths
    came last, and in which rounds requests met, changes their number by some hundred.
    """
    gc.collect()
    alive = gc.get_objects()
    # Other libraries' objects compute what they say their class is.
    tasks = [task for task in alive if issubclass(type(task), StackTask)]
    buffers = {id(each) for task in tasks for each in (*task.outputs, task.scratch, getattr(task, "read", None))}
    # Stand-ins that a compiler has traced with are tensors in name only, and may not know their sizes any more.
    kinds = (torch.Tensor, torch.nn.Parameter)
    found: list[Any] = [each for each in alive if type(each) in kinds and id(each) not in buffers]
    return len(found), sum(each.numel() for each in found)


def grows_every_time(ask: Callable[[], object], times: int = 6) -> list[tuple[int, int]]:
    """What was alive after each call of ``ask``, which asks a hundred requests; empty if one call left nothing behind.

    A tensor a request would be a hundred more every time. What is kept once, for whatever a process has done before,
    comes once; how wide the caches were in which requests met differs from call to call, up and down.
    """
    found: list[tuple[int, int]] = []
    for _ in range(times):
        ask()
        found.append(live_tensors())
        if len(found) > 1 and found[-1][0] <= found[-2][0] + 20 and found[-1][1] <= 1.2 * found[-2][1]:
            return []
    return found
