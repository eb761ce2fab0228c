# SPDX-License-Identifier: Apache-2.0
"""The columns of several rows side by side, for one call of an attention function instead of one a row."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .span import Span


class Padded:
    """Columns of rows side by side as `[B, ...]`, for one call of an attention function.

    Args:
        spans: of the rows; device: where the pass is computed.
    """

    def __init__(self, spans: Sequence[Span], device: torch.device) -> None:
        most, longest = max(span.count for span in spans), max(span.end for span in spans)
        firsts, counts = (torch.tensor([getattr(span, name) for span in spans])[:, None] for name in ("first", "count"))
        bases, ends = (torch.tensor([getattr(span, name) for span in spans])[:, None] for name in ("base", "end"))
        new, held = torch.arange(most)[None], torch.arange(longest)[None]
        self.shape = len(spans), most, longest
        self.queries = (firsts + new.minimum(counts - 1)).flatten().to(device)  # rows end with their last one repeated
        self.keys = (bases + held.minimum(ends - 1)).flatten().to(device)
        self.back = (new < counts).flatten().nonzero().flatten().to(device)
        self.seen = held[:, None] <= (ends - counts + new.minimum(counts - 1))[:, :, None]  # [B, most, longest]
        self.device = device
        self._masks: dict[int, torch.Tensor] = {}

    def rows(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, masks: list[torch.Tensor | None]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries `[B, heads, most, D]`, keys and values `[B, shared, longest, D]`, and a mask of the pass's, whose
        columns these are."""
        batch, most, longest = self.shape

        def side_by_side(states: torch.Tensor, index: torch.Tensor, columns: int) -> torch.Tensor:
            picked = states[0].index_select(1, index)  # [H, B * columns, D]
            return picked.view(states.shape[1], batch, columns, states.shape[3]).transpose(0, 1)

        return (
            side_by_side(query, self.queries, most),
            side_by_side(key, self.keys, longest),
            side_by_side(value, self.keys, longest),
            self._mask(masks),
        )

    def _mask(self, masks: list[torch.Tensor | None]) -> torch.Tensor:
        """`[B, 1, most, longest]` boolean, of the masks of the rows."""
        found = self._masks.get(id(masks))
        if found is None:
            found = self.seen.clone().to(self.device)
            for row, mask in enumerate(masks):
                if mask is not None:
                    count, end = mask.shape[2:]
                    found[row, :count, :end] = mask[0, 0]
                    found[row, count:, :end] = mask[0, 0, -1]
            found = self._masks[id(masks)] = found[:, None]
        return found

    def columns(self, out: torch.Tensor) -> torch.Tensor:
        """`[1, N, heads, D]` of `[B, most, heads, D]`: the columns of the pass again."""
        return out.flatten(0, 1).index_select(0, self.back)[None]
