# SPDX-License-Identifier: Apache-2.0
"""Saying that there is no memory for a packed matrix, once a model."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

from torch import nn

from hf_polyspec.cpu.memory import memory, spare


def megabytes(size: float) -> str:
    """Bytes as a person reads them."""
    return f"{size / 1e6:,.1f} MB"


class Shortage:
    """What the products of one model share: that nobody has been told yet that memory is short.

    Attributes:
        ever: whether that was said of any model.
    """

    ever = False

    def __init__(self, name: str = "model") -> None:
        self._name, self._told = name, False

    def tell(self, layers: Sequence[nn.Linear], needed: int) -> None:
        """Warn, the first time, that the matrix of some layers is not packed."""
        if self._told:
            return
        self._told = Shortage.ever = True
        seen = memory()
        sizes = f"{sum(layer.out_features for layer in layers)} x {layers[0].in_features}"
        warnings.warn(
            f"A matrix of {sizes} of the {self._name} is not packed, and others may not be: that takes "
            f"{megabytes(needed)} of memory beside {megabytes(spare())} that stay free for others, and "
            f"{megabytes(seen.available)} are available. It is multiplied as without packing, slower, and packed when "
            "there is memory again.",
            stacklevel=2,
        )
