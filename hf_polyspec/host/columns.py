# SPDX-License-Identifier: Apache-2.0
"""What the columns of a pass are: which hold a token, at which position of its text, and what is said after it."""

from __future__ import annotations

from typing import Any

import torch

from ..exactness.context import Context, Prompt


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
    if len(sequences) == 1 and (first := len(sequences[0]) - fed) >= prompt.width:  # nearly all passes of one row
        onward = prompt.following[0] + first - prompt.width
        return torch.arange(onward, onward + fed)[None]
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


def position_of(prompt: Prompt, row: int, index: int) -> int:
    """The position id of a row's id at `index`, padding included: the prompt's own, then counting on."""
    if index < prompt.width:
        return int(prompt.positions[row, index])
    return prompt.following[row] + index - prompt.width


def embedded_inputs(model: Any, prompt: Prompt, ids: torch.Tensor, unused: list[int], width: int) -> torch.Tensor:
    """Input embeddings `[B, F, H]`: the caller's where he gave a prompt's, the model's own elsewhere.

    Args:
        model: the level's; prompt: with embeddings.
        ids: `[B, F]` of the fed columns, on the model's device.
        unused: columns at the left of each row; width: columns S + F in all.
    """
    assert prompt.embeds is not None
    given = prompt.embeds.to(ids.device)
    embedded: torch.Tensor = model.get_input_embeddings()(ids.clamp(min=0)).to(given.dtype).clone()
    fed = ids.shape[1]
    for row, left in enumerate(unused):
        first = width - fed - left  # index in the row's sequence of the first fed column
        start, end = max(0, -first), min(fed, given.shape[1] - first)
        if start < end:
            embedded[row, start:end] = given[row, first + start : first + end]
    return embedded


def aligned(logits: torch.Tensor, drafts: list[list[int]], wanted: int, device: torch.device) -> torch.Tensor:
    """The last K + 1 columns, moved so that each row's draft starts at column 0; float32 or wider, on `device`."""
    logits = logits[:, -wanted:]
    logits = logits.to(device=device, dtype=torch.promote_types(logits.dtype, torch.float32))
    shifts = [wanted - 1 - len(draft) for draft in drafts]
    if not any(shifts):
        return logits
    columns = torch.arange(wanted)[None, :] + torch.tensor(shifts)[:, None]
    columns = columns.clamp(max=wanted - 1).to(device)
    return logits.gather(1, columns[:, :, None].expand(-1, -1, logits.shape[2]))
