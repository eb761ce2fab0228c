# SPDX-License-Identifier: Apache-2.0
"""Texts as a tensor that is kept from round to round: only what is new in them is written."""

from __future__ import annotations

import torch

from .context import common_prefix


class IdRows:
    """Rows of ids in a buffer; what a round costs does not grow with the text before it."""

    def __init__(self) -> None:
        self._held: list[list[int]] = []
        self._buffer: torch.Tensor | None = None

    def of(self, rows: list[list[int]], device: torch.device) -> torch.Tensor:
        """`[B, W]` with W the longest row; behind the end of a shorter one stand some ids.

        Args:
            rows: as many as one likes, not changed afterwards; device: where they are looked at.
        """
        width, buffer = max(map(len, rows)), self._buffer
        if buffer is None or buffer.shape[0] != len(rows) or buffer.shape[1] < width or buffer.device != device:
            buffer = torch.zeros(len(rows), width + width // 2 + 64, dtype=torch.long, device=device)
            self._buffer, self._held = buffer, [[] for _ in rows]
        for place, (row, held) in enumerate(zip(rows, self._held, strict=True)):
            same = common_prefix(row, held)
            if same < len(row):
                buffer[place, same : len(row)] = torch.tensor(row[same:])
        self._held = rows
        return buffer[:, :width]
