# SPDX-License-Identifier: Apache-2.0
"""From a drafter's states to its likeliest ids with everything but what changes written down before.

A norm, a product with fixed rows, one with rows that have joined, and `guesses`: four tasks of which each takes about
as long as its call from Python would, if that had to find out again what it is to compute.
"""

from __future__ import annotations

from array import array
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from hf_polyspec.cpu.compiled.guesses import Raised
    from hf_polyspec.cpu.compiled.product import CompiledProduct
    from hf_polyspec.cpu.compiled.tasks import Launch

_Task = tuple["array[int]", "Launch"]
Norm = tuple[Tensor, float]
"""Weights `[H]` and epsilon."""


class ScoreTask:
    """One thread's own; what it gives lasts until it is run again.

    Args:
        nodes: states at once; count: the likeliest that are wanted, 1 or more.
        norm: of the states before they are multiplied.
        fixed: the product with the fixed rows, stored in the dtype of the states.
        room: most rows that may join.
    """

    def __init__(self, nodes: int, count: int, norm: Norm, fixed: CompiledProduct, room: int) -> None:
        from hf_polyspec.cpu.compiled import blocks, guesses, product
        from hf_polyspec.cpu.compiled.vectors import LANES

        dtype, (first, width) = fixed.dtype, fixed.shape
        self.made_of = (norm[0].data_ptr(), norm[1], id(fixed), room, torch.get_num_threads())
        self._nodes, self._norm, self._fixed, self._lanes = nodes, norm, fixed, LANES
        self._joined: CompiledProduct | None = None
        self._normed = torch.empty(nodes, width, dtype=dtype, device="cpu")
        self._pieces = [torch.empty(nodes, size, dtype=dtype, device="cpu") for size in (first, room)]
        self._scores = torch.empty(nodes, first + room + LANES, dtype=torch.float32, device="cpu")
        self._best = torch.empty(nodes, count, dtype=torch.float32, device="cpu")
        self._columns = torch.empty(nodes, count, dtype=torch.long, device="cpu")
        normed, left, right = (part.data_ptr() for part in (self._normed, *self._pieces))
        numbers = blocks.norm_numbers(nodes, *norm, 0, normed)
        self._norming: _Task = array("q", (0, *numbers)), blocks.norming(dtype)
        multiply = product.multiplying(dtype)
        self._products: list[_Task] = [(array("q", (0, *fixed.task(nodes, normed, left))), multiply)]
        self._multiply = multiply
        written = (self._scores.data_ptr(), self._best.data_ptr(), count, self._columns.data_ptr())
        numbers = (nodes, first, 0, self._pitch(first), left, right, 0, 0, 0, *written)
        self._guessing: _Task = array("q", (0, *numbers)), guesses.guessing(dtype, nodes)

    def join(self, joined: CompiledProduct | None) -> None:
        """Take the product with the rows that have joined by now, none of them if None."""
        if joined is self._joined:
            return
        self._joined, second = joined, 0
        del self._products[1:]
        if joined is not None:
            second = joined.shape[0]
            numbers = joined.task(self._nodes, self._normed.data_ptr(), self._pieces[1].data_ptr())
            self._products.append((array("q", (0, *numbers)), self._multiply))
        self._guessing[0][3], self._guessing[0][4] = second, self._pitch(self._fixed.shape[0] + second)

    def _pitch(self, width: int) -> int:
        return -(-width // self._lanes) * self._lanes

    def run(self, states: Tensor, raised: Raised) -> tuple[Tensor, Tensor]:
        """The likeliest of each node, see `guesses`.

        Args:
            states: `[..., H]`, n of them, contiguous, of the dtype of the products; raised: see `guesses`.

        Returns:
            Log-probabilities (scores where one is wanted) and columns, each `[n, count]`.

        Raises:
            RuntimeError: The states have lost their memory.
            MemoryError: There is no memory to work in.
        """
        from hf_polyspec.cpu.compiled.places import address
        from hf_polyspec.cpu.compiled.tasks import check_counter

        nodes, columns, shares = raised
        which, added = array("q", (*nodes, *columns)), array("d", shares)
        self._norming[0][4] = address(states, "hidden states")
        last = self._guessing[0]
        last[7], last[8], last[9] = len(added), which.buffer_info()[0], added.buffer_info()[0]
        for numbers, launch in (self._norming, *self._products, self._guessing):
            numbers[0] = 0
            launch(numbers.buffer_info()[0])
            check_counter(numbers[0])
        return self._best, self._columns
