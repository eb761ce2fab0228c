# SPDX-License-Identifier: Apache-2.0
"""A product with the first so many rows of a buffer, rows of which are written anew now and then."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from .panels import WIDTH, in_panels
from .product import CompiledProduct


class GrowingProduct(CompiledProduct):
    """The rows of a buffer as a matrix.

    Args:
        weight: `[N, K]` on the CPU, float32, bfloat16 or float16; kept in an order of its own.
    """

    def __init__(self, weight: Tensor) -> None:
        super().__init__(weight, None)
        self._width = weight.shape[1]
        self._bias: Tensor | None = None

    def renew(self, weight: Tensor, places: Iterable[int]) -> None:
        """Take in rows of the buffer that have changed.

        Args:
            weight: `[N, K]`, all of it; places: of the rows.
        """
        for panel in {place // WIDTH for place in places}:
            self._panels[panel] = in_panels(weight[panel * WIDTH : (panel + 1) * WIDTH])[0]

    def score(self, x: Tensor, count: int, bias: Tensor | None = None) -> Tensor:
        """`[..., K]` -> `[..., count]` by the first rows, with a bias `[count]` or without.

        Raises:
            RuntimeError: see `multiplied`.
            MemoryError: There is no memory to work in.
        """
        if count != self.shape[0] or bias is not self._bias:
            vectors = torch.zeros(3, -(-count // WIDTH) * WIDTH)
            vectors[1] = 1
            if bias is not None:
                vectors[2, :count] = bias
            self.shape, self._vectors, self._bias = (count, self._width), vectors, bias
        return self(x)
