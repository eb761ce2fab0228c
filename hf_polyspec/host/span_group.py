# SPDX-License-Identifier: Apache-2.0
"""The columns of a pass over several rows, in layers that hold equally much of each row's text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from .side_by_side import Padded
from .span import Rule, Span

_FEW_ROWS = 12
"""Up to so many rows, the CPU attends to each by itself, and copies no keys."""
_LITTLE = 4096
"""Up to so many columns, padding included, may be copied whatever part of them is padding."""
_CPU = torch.device("cpu")
Masks = list[torch.Tensor | None]


class SpanGroup:
    """Spans by row, in the order of their columns in the pass, and what is made of them once a pass."""

    def __init__(self, spans: Sequence[Span]) -> None:
        self.spans = spans
        self._written: dict[torch.device, torch.Tensor] = {}
        self._padded: dict[torch.device, Padded] = {}
        self._masks: dict[tuple[int, torch.device], Masks] = {}

    def written(self, device: torch.device = _CPU) -> torch.Tensor:
        """`[N]`, where in the cache each column of the pass belongs."""
        if device not in self._written:
            self._written[device] = torch.tensor([c for span in self.spans for c in span.written], device=device)
        return self._written[device]

    def masks(self, place: int, rule: Rule, device: torch.device) -> Masks:
        """Per span, its mask under a rule; `place` is the rule's number, -1 for the plain causal one."""
        found = self._masks.get((place, device))
        if found is None:
            # One column that sees all before it: nearly all passes are of these, and nothing is to be looked up.
            made = [
                None if place < 0 and span.count == 1 and not span.dropped else span.mask(rule) for span in self.spans
            ]
            found = self._masks[place, device] = [None if mask is None else mask.to(device) for mask in made]
        return found

    def rows(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, masks: Masks
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]]:
        """Each row's queries `[1, heads, count, D]`, keys and values `[1, shared, end, D]`, and mask.

        Args:
            query: of the pass `[1, heads, N, D]`; key, value: with the regions of all rows `[1, shared, capacity, D]`.
            masks: by row.
        """
        for span, mask in zip(self.spans, masks, strict=True):
            new, held = slice(span.first, span.first + span.count), slice(span.base, span.base + span.end)
            yield query[:, :, new], key[:, :, held], value[:, :, held], mask

    def goes_together(self, device: torch.device) -> bool:
        """Whether one call for all rows, padded for its time alone, is cheaper than one for each.

        So it is with many rows, or on a device where every call costs something, and with little padding.
        """
        rows = len(self.spans)
        if rows <= (_FEW_ROWS if device.type == "cpu" else 1):
            return False
        counts, ends = [span.count for span in self.spans], [span.end for span in self.spans]
        even = rows * max(ends) <= 2 * sum(ends)
        return rows * max(counts) <= 2 * sum(counts) and (even or rows * max(ends) <= _LITTLE)

    def padded(self, device: torch.device) -> Padded:
        """The rows side by side; made once a pass."""
        if device not in self._padded:
            self._padded[device] = Padded(self.spans, device)
        return self._padded[device]
