# SPDX-License-Identifier: Apache-2.0
"""What the columns of a pass are: which hold a token, and at which position of its text."""

from __future__ import annotations

import torch

from ..exactness.context import Context


def mask_of(context: Context, unused: list[int], width: int) -> torch.Tensor | None:
    """`[B, S + F]` of 0/1, or None when every column of every row is real (attention is then plainly causal)."""
    prompt = context.prompt
    if prompt.mask is None and not any(unused):
        return None
    mask = torch.ones(len(unused), width, dtype=torch.long)
    for row, left in enumerate(unused):
        mask[row, :left] = 0
        if prompt.mask is not None:
            seen = min(prompt.width, width - left)
            mask[row, left : left + seen] = prompt.mask[row, :seen]
    return mask


def positions_of(context: Context, sequences: list[list[int]], fed: int) -> torch.Tensor:
    """Position ids `[B, F]` of the fed columns: the prompt's own, then counting on; 0 where a row has no token."""
    prompt = context.prompt
    positions = torch.zeros(len(sequences), fed, dtype=torch.long)
    for row, ids in enumerate(sequences):
        first = max(0, len(ids) - fed)  # index in the row of its first fed token
        known = prompt.positions[row, first : min(len(ids), prompt.width)]
        counted = len(ids) - max(first, prompt.width)
        start = fed - (len(ids) - first)
        positions[row, start : start + known.shape[0]] = known
        if counted > 0:
            onward = prompt.following[row] + max(first, prompt.width) - prompt.width
            positions[row, fed - counted :] = torch.arange(onward, onward + counted)
    return positions
