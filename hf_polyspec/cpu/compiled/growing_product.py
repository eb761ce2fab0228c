# SPDX-License-Identifier: Apache-2.0
"""A product with the first so many rows of a buffer, rows of which are written anew now and then."""

from __future__ import annotations

from collections.abc import Iterable
from copy import copy

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
        self._made_for: tuple[int, int] | None = None

    def renew(self, weight: Tensor, places: Iterable[int]) -> None:
        """Take in rows of the buffer that have changed.

        Args:
            weight: `[N, K]`, all of it; places: of the rows.
        """
        for panel in {place // WIDTH for place in places}:
            self._panels[panel] = in_panels(weight[panel * WIDTH : (panel + 1) * WIDTH])[0]

    def of_first(self, count: int, bias: Tensor | None, version: int) -> GrowingProduct:
        """The same matrix's first rows; another thread may be multiplying by this one, which stays as it is.

        Args:
            count: of rows; bias: `[N]`, or None for none; version: another number whenever numbers of it have changed.

        Returns:
            A product `[..., K]` -> `[..., count]`, this one if it is that already.
        """
        wanted = count, 0 if bias is None else version
        if wanted == self._made_for:
            return self
        vectors = torch.zeros(3, -(-count // WIDTH) * WIDTH)
        vectors[1] = 1
        if bias is not None:
            vectors[2, :count] = bias[:count]
        made = copy(self)
        made.shape, made._vectors, made._made_for = (count, self._width), vectors, wanted
        return made
