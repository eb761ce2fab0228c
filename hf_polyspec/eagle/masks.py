# SPDX-License-Identifier: Apache-2.0
"""Which cached pairs a head may look at: masks and positions from what a caller gives."""

from __future__ import annotations

import torch


def default_positions(attention_mask: torch.Tensor | None, past: int, count: int, device: torch.device) -> torch.Tensor:
    """Returns the positions of the last `count` of `past + count` pairs, `[B or 1, count]`.

    Padding marked in a 2-D mask is not counted, so a left-padded row starts at position 0.

    Raises:
        ValueError: If the mask is 4-D, from which positions cannot be read (a tree's siblings share one).
    """
    if attention_mask is None:
        return torch.arange(past, past + count, device=device)[None]
    if attention_mask.dim() != 2:
        raise ValueError("position_ids must be given together with a 4-D attention_mask.")
    positions = attention_mask.to(device).long().cumsum(-1) - 1
    return positions.clamp_min(0)[:, -count:]


def attention_mask_4d(
    attention_mask: torch.Tensor | None, past: int, count: int, device: torch.device, dtype: torch.dtype
) -> tuple[torch.Tensor | None, bool]:
    """Turns a caller's mask into what attention takes.

    Args:
        attention_mask: `None`, `[B, past + count]` with 0 for padding, or a ready 4-D mask.
        past: Entries already cached.
        count: Pairs in this step.
        device: Where attention runs.
        dtype: Floating type of an additive mask.

    Returns:
        The mask broadcastable to `[B, n_h, count, past + count]`, or `None`, and whether plain causal masking
        over a square is to be used instead.

    Raises:
        ValueError: If the mask has another shape.
    """
    total = past + count
    if attention_mask is None:
        if count == 1:
            return None, False
        return (None, True) if past == 0 else (_causal(past, count, device)[None, None], False)
    if attention_mask.shape[-1] != total:
        shape = list(attention_mask.shape)
        raise ValueError(f"attention_mask must cover the {past} cached and {count} new pairs, got {shape}.")
    mask = attention_mask.to(device)
    if mask.dim() == 2:
        real = mask.bool()
        visible = _causal(past, count, device)[None] & real[:, None, :]
        # a padding query sees nothing real; looking at itself keeps its (unused) output finite
        return (visible | _itself(past, count, device)[None])[:, None], False
    if mask.dim() != 4 or mask.shape[2] != count:
        shape = list(mask.shape)
        raise ValueError(f"attention_mask must be [B, {total}] or [B, 1, {count}, {total}], got {shape}.")
    if mask.dtype == torch.bool:
        return mask, False
    if not mask.is_floating_point():
        raise ValueError("A 4-D attention_mask must be boolean (True is visible) or additive floating point.")
    return mask.to(dtype), False


def windowed(
    mask: torch.Tensor | None, causal: bool, queries: torch.Tensor, keys: torch.Tensor, window: int
) -> torch.Tensor:
    """Hides from a mask what lies further back than a sliding window, by position.

    Args:
        mask: What `attention_mask_4d` returned.
        causal: What `attention_mask_4d` returned.
        queries: Positions of the new pairs, `[B, count]`.
        keys: Positions of all pairs, `[B, past + count]`.
        window: How many positions a query sees, its own included.

    Returns:
        A mask `[B, 1 or n_h, count, past + count]`.
    """
    # [B, 1, count, past + count]
    near = (keys[:, None, :] > queries[:, :, None] - window)[:, None]
    if causal:
        near = near & _causal(0, queries.shape[1], near.device)
    if mask is None:
        return near
    return mask & near if mask.dtype == torch.bool else mask.masked_fill(~near, torch.finfo(mask.dtype).min)


def _causal(past: int, count: int, device: torch.device) -> torch.Tensor:
    # [count, past + count]
    return torch.ones(count, past + count, dtype=torch.bool, device=device).tril(past)


def _itself(past: int, count: int, device: torch.device) -> torch.Tensor:
    # [count, past + count], entry t sees column past + t only
    return torch.ones(count, past + count, dtype=torch.bool, device=device).tril(past).triu(past)
