# SPDX-License-Identifier: Apache-2.0
"""What multiplies a matrix, and two of them for one matrix, told apart by the number of rows."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from hf_polyspec.integers.linear import Kernel


class ByRows:
    """One kernel for few rows, another for many; the second is built when it is first needed.

    Args:
        few: Kernel for up to `limit` rows.
        many: Builds the kernel for more.
        limit: Rows, the product of all leading sizes.

    Attributes:
        ever: whether there was one.
    """

    ever = False

    def __init__(self, few: Kernel, many: Callable[[], Kernel], limit: int) -> None:
        self._few, self._build, self._limit = few, many, limit
        self._many: Kernel | None = None
        ByRows.ever = True

    def __call__(self, x: Tensor) -> Tensor:
        if x.numel() <= self._limit * x.shape[-1]:
            return self._few(x)
        if self._many is None:
            self._many = self._build()
        return self._many(x)
