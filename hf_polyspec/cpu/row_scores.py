# SPDX-License-Identifier: Apache-2.0
"""Scores by some rows of an lm_head: a slice that stays, or a buffer whose rows are written to one after another.

torch's own product of one state and a few thousand 16-bit rows takes several times what the memory takes to deliver
them, so it is compiled where it can be.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, nn

from hf_polyspec.cpu.compiled import computes
from hf_polyspec.cpu.float_kernels import packed_size
from hf_polyspec.cpu.memory import grant

if TYPE_CHECKING:
    from hf_polyspec.cpu.compiled.growing_product import GrowingProduct


class RowScores:
    """The rows `[N, H]` of a buffer, of which the first so many are scored by.

    Args:
        weight: `[N, H]`, bias: `[N]` or None; written to by `put` alone.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self.weight = weight
        self.bias = bias
        self._product: GrowingProduct | None = None
        self._written = 0
        self._refused = False

    def put(self, places: list[int], weight: Tensor, bias: Tensor | None) -> None:
        """Write rows `[n, H]` to these places."""
        self.weight[places] = weight
        if self.bias is not None and bias is not None:
            self.bias[places] = bias
        self._written += 1
        if self._product is not None:
            self._product.renew(self.weight, places)

    def score(self, hidden: Tensor, count: int | None = None) -> Tensor:
        """`[..., H]` -> `[..., count]`, by all rows unless told."""
        count = len(self.weight) if count is None else count
        product = self.product(hidden, count)
        if product is not None:
            return product(hidden)
        bias = None if self.bias is None else self.bias[:count]
        return nn.functional.linear(hidden, self.weight[:count], bias)

    def product(self, hidden: Tensor, count: int) -> GrowingProduct | None:
        """The compiled product of such states with the first `count` rows, None where torch is to multiply."""
        if not self._compiles(hidden):
            return None
        assert self._product is not None
        self._product = product = self._product.of_first(count, self.bias, self._written)
        return product  # not what another thread may have put there meanwhile

    def _compiles(self, hidden: Tensor) -> bool:
        """Whether the compiled product serves these states; it is made when it first does, if there is memory."""
        if self._refused or not computes(hidden) or hidden.dtype is not self.weight.dtype:
            return False
        if hidden.shape[-1] != self.weight.shape[1] or not self.weight.is_cpu:
            return False
        if self._product is None:
            from hf_polyspec.cpu.compiled.growing_product import GrowingProduct

            self._refused = not grant(packed_size(self.weight))
            if not self._refused:
                self._product = GrowingProduct(self.weight)
        return not self._refused
