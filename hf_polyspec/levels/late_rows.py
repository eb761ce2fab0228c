# SPDX-License-Identifier: Apache-2.0
"""Rows that draft in one batch of steps, some of which begin to draw later than others."""

from __future__ import annotations

import torch


def column_of(late: list[int], drawn: list[int], step: int) -> int:
    """The token a row is fed at a step; rows that have stopped are fed anything."""
    if step < len(late):
        return late[step]
    return drawn[-1] if drawn else 0


def aligned_laws(laws: list[torch.Tensor | None], delays: list[int], tokens: list[list[int]]) -> torch.Tensor | None:
    """`[B, K, V]` from a law `[B, V]` a step; row b drew its first token at step `delays[b]`."""
    like = next((law for law in laws if law is not None), None)
    width = max(len(row) for row in tokens)
    if like is None or not width:
        return None
    stacked = torch.stack([torch.zeros_like(like) if law is None else law for law in laws], dim=1)  # [B, steps, V]
    if not any(delays):
        return stacked[:, :width]
    columns = torch.arange(width)[None, :] + torch.tensor(delays)[:, None]
    columns = columns.clamp(max=stacked.shape[1] - 1).to(stacked.device)
    return stacked.gather(1, columns[:, :, None].expand(-1, -1, stacked.shape[2]))
