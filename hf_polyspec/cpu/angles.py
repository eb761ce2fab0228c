# SPDX-License-Identifier: Apache-2.0
"""Cosines and sines of positions, looked up in tables."""

from __future__ import annotations

from collections.abc import Sequence
from ctypes import c_int16, c_int32
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hf_polyspec.host.straight import MOST

TABLE = 1024
"""Positions in a table, which holds `MOST` more, so that a row's columns lie in one."""
_TABLES = 64
"""Tables that are kept."""


class Angles:
    """What a model's rotary embedding says of positions, at which angles stay whatever the length of a text.

    Args:
        rotary: the module; like: `[1, 1, H]`, of the dtype that is wanted.
    """

    def __init__(self, rotary: Any, like: Tensor) -> None:
        self._rotary, self._like = rotary, like
        self._tables: dict[int, tuple[Any, Any]] = {}

    def at(self, positions: Sequence[int]) -> tuple[Any, Any]:
        """Cosines and sines `[F, D]`, as numpy sees them; the caller keeps them for as long as they are read.

        Args:
            positions: F of them, any that a caller may have given.
        """
        first = positions[0]
        if isinstance(positions, range) and len(positions) <= MOST and positions.step == 1:
            cos, sin = self._table(first // TABLE)
            inside = slice(first % TABLE, first % TABLE + len(positions))
            return cos[inside], sin[inside]
        begin = min(positions) // TABLE
        if max(positions) < (begin + 1) * TABLE + MOST:
            cos, sin = self._table(begin)
            places = [position - begin * TABLE for position in positions]
            return cos[places], sin[places]
        found = [self._table(position // TABLE) for position in positions]
        places = [position % TABLE for position in positions]
        cosines, sines = (
            np.stack([table[kind][place] for table, place in zip(found, places, strict=True)]) for kind in (0, 1)
        )
        return cosines, sines

    def _table(self, number: int) -> tuple[Any, Any]:
        """Of positions from so many tables on."""
        found = self._tables.get(number)
        if found is None:
            if len(self._tables) >= _TABLES:
                del self._tables[next(iter(self._tables))]
            places = torch.arange(number * TABLE, (number + 1) * TABLE + MOST, device="cpu")[None]
            cos, sin = self._rotary(self._like, position_ids=places)
            found = self._tables[number] = self.numbers(cos), self.numbers(sin)
        return found

    def numbers(self, turns: Tensor) -> Any:
        """`[F, D]` of what the module said, copied: it may have shown a buffer of its own."""
        return numbers_of(turns[0].to(self._like.dtype, copy=True).contiguous())


def numbers_of(tensor: Tensor) -> Any:
    """A tensor's memory as numpy sees it, which knows no bfloat16; its storage can never be resized again."""
    return tensor.view({2: torch.int16, 4: torch.int32}[tensor.element_size()]).numpy()


def lent_numbers_of(tensor: Tensor) -> Any:
    """The same of a contiguous one that is somebody's, who may take its memory away, as FSDP does which gathers weights
    for a call: whoever reads asks first whether it is still there."""
    kind = {2: c_int16, 4: c_int32}[tensor.element_size()]
    return np.ctypeslib.as_array((kind * tensor.numel()).from_address(tensor.data_ptr())).reshape(tensor.shape)
