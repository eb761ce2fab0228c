# SPDX-License-Identifier: Apache-2.0
"""Training-time test: every row of a text drafts several steps at once, as it would at inference.

At step s, row i reads the head's own output of step s-1 in place of a feature and the token i+1+s. It attends to the
pairs 0..i that were computed from true features (step 0) and to its own row of the steps 1..s, which stand at the
positions i+1..i+s (EAGLE-3, arXiv 2503.01840, section 3). That is what drafting sees: a stable prefix followed by
the row's own speculative ancestors. Steps after the first cost no T x T product of their own keys, only one dot
product a row, and may be taken by a part of the rows only.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from hf_polyspec.eagle.modeling import EagleHead


class UnrolledAttention:
    """Attention of one layer over a causal block of keys and one diagonal for every later step.

    Attributes:
        places: `[R]`, where in the text the rows stand that queries come from.
    """

    def __init__(self, places: torch.Tensor) -> None:
        self.places = places
        self.keys: list[torch.Tensor] = []
        self.values: list[torch.Tensor] = []

    def __call__(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """Attends, and keeps the new keys and values for the steps to come.

        Args:
            query: `[B, n_h, R, d]`, rotated.
            key: `[B, n_kv, R, d]`, rotated.
            value: `[B, n_kv, R, d]`.

        Returns:
            `[B, n_h, R, d]`.
        """
        self.keys.append(key)
        self.values.append(value)
        batch, heads, rows, width = query.shape
        kv_heads, length = key.shape[1], self.keys[0].shape[2]
        # [B, n_kv, G, R, d]: the G query heads that share a key head side by side
        grouped = query.view(batch, kv_heads, heads // kv_heads, rows, width) * width**-0.5
        blocked = torch.arange(length, device=query.device) > self.places[:, None]  # [R, T]
        # [B, n_kv, G, R, T]
        block = grouped @ self.keys[0].unsqueeze(2).transpose(-1, -2)
        block = block.float().masked_fill(blocked, float("-inf"))
        # s entries [B, n_kv, G, R]
        own = [(grouped * key.unsqueeze(2)).sum(-1).float() for key in self.keys[1:]]
        weights = torch.cat([block, *(score.unsqueeze(-1) for score in own)], dim=-1).softmax(-1)
        weights = weights.to(query.dtype)
        mixed = weights[..., :length] @ self.values[0].unsqueeze(2)
        for index, value in enumerate(self.values[1:]):
            mixed = mixed + weights[..., length + index, None] * value.unsqueeze(2)
        return mixed.view(batch, heads, rows, width)


def unroll(
    head: EagleHead,
    tokens: torch.Tensor,
    features: torch.Tensor,
    steps: int,
    keep: torch.Tensor | None = None,
    first: int = 0,
) -> Iterator[torch.Tensor]:
    """Drafts `steps` tokens from every row at once, teacher-forced.

    Args:
        head: the head; its target is bound.
        tokens: `[B, T]` target ids of the texts, padded on the right.
        features: `[B, T, F]` target features of the same positions.
        steps: how many steps, S; at least 1.
        keep: `[R]`, the rows that draft on after the first step, ascending and none before `first`; None for all.
        first: rows before it draft nothing, they are only attended to.

    Yields:
        For step s `[B, T-1-first, H]`, the rows from `first` on: row i is the head's guess of feature i+1+s, whose
        logits are about token i+2+s. Rows from T-1-s on have run out of text and hold nothing meaningful. From step 1
        on `[B, R, H]`, the rows `keep`, where these are given.
    """
    rows = tokens.shape[1] - 1
    stream = head.fuse(features[:, :rows])  # [B, T-1, H]
    places = torch.arange(rows, device=tokens.device)
    attention = [UnrolledAttention(places) for _ in head.layers]
    attention[-1].places = places[first:]  # what the last layer makes of the others nobody reads
    for step in range(steps):
        if step == 1:
            places = places[first:] if keep is None else keep
            if keep is not None:
                stream = stream[:, keep - first]
            for attend in attention:
                attend.places = places  # the others stay as the text that these attend to
        # token i+1+s in row i; the rows at the end repeat the last token and are never counted
        follows = tokens[:, (places + 1 + step).clamp(max=rows)]
        mixed, embedded = head.mix(follows, stream)
        rotary = head.rotary(mixed, places[None] + step)
        for layer, attend in zip(head.layers, attention, strict=True):
            skipped = first if step == 0 and attend is attention[-1] else 0
            mixed = layer(mixed, embedded, rotary, attend, skipped)
        stream = head.norm(mixed) if head.config.norm_output else mixed
        yield stream


def shifted(values: torch.Tensor, offset: int, fill: float = 0) -> torch.Tensor:
    """Moves a text's values to the rows that predict them.

    Args:
        values: `[B, T, ...]`, one for each position of the text.
        offset: row i gets the value of position i + offset.
        fill: for rows that have run out of text.

    Returns:
        `[B, T-1, ...]`.
    """
    rows = values.shape[1] - 1
    moved = values[:, offset : offset + rows]
    missing = rows - moved.shape[1]
    if missing <= 0:
        return moved
    tail = moved.new_full((moved.shape[0], missing, *moved.shape[2:]), fill)
    return torch.cat([moved, tail], dim=1)
