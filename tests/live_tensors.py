# SPDX-License-Identifier: Apache-2.0
"""How many tensors are alive, but for the work buffers of packed models, which are bounded by themselves."""

from __future__ import annotations

import gc
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
    buffers = {id(each) for task in alive if type(task) is StackTask for each in (*task.outputs, task._kept[0])}
    # Stand-ins that a compiler has traced with are tensors in name only, and may not know their sizes any more.
    kinds = (torch.Tensor, torch.nn.Parameter)
    found: list[Any] = [each for each in alive if type(each) in kinds and id(each) not in buffers]
    return len(found), sum(each.numel() for each in found)
