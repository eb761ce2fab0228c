# SPDX-License-Identifier: Apache-2.0
"""What generate() prepared of a prompt, as levels see it: ids, mask, positions, embeddings, what a cache holds."""

from __future__ import annotations

from typing import Any

import torch
from transformers import GenerationConfig

from ..exactness.context import EMBEDDED, Context, Prompt
from ..host.callers_cache import check_prompt, counts_nothing, tokens_held
from ..host.generation import mask_length
from ..host.release import GENERATION_CACHE, cache_of


def context_of(
    input_ids: torch.Tensor, config: GenerationConfig, model_kwargs: dict[str, Any], *, encodes: bool = False
) -> Context:
    """The prompt as levels see it.

    Args:
        input_ids, config, model_kwargs: as generate() prepared them.
        encodes: whether the ids are a decoder's, which plain generation reads as what comes after a filled cache unless
            a mask of their own says that they are the whole text.

    Raises:
        ValueError: mask or positions of a form that a chain does not understand, or an empty prompt.
    """
    embeds = model_kwargs.get("inputs_embeds")
    if input_ids.shape[0] == 0:
        raise ValueError("input_ids has 0 rows; assistant_models need at least one prompt.")
    ids = [[int(token) for token in row] for row in input_ids.tolist()]
    cache = cache_of(model_kwargs)
    past = 0 if cache is None else tokens_held(cache)
    uncounted = past if _comes_before(cache) else 0
    mask = model_kwargs.get("attention_mask")
    width = mask.shape[1] if mask is not None else mask_length(config)
    if encodes and past and width is None:
        width = past + input_ids.shape[1]
    hidden = _without_ids(input_ids.shape[1], embeds, cache, width)
    if embeds is not None and uncounted:
        embeds = torch.cat([torch.zeros_like(embeds[:, :uncounted]), embeds], dim=1)
    ids = [[EMBEDDED] * hidden + row for row in ids]
    columns = len(ids[0])
    if columns == 0:
        raise ValueError("the prompt is empty; assistant_models need at least one token to start from.")
    positions = model_kwargs.get("position_ids")
    if positions is not None and positions.ndim not in (2, 3):
        raise ValueError("position_ids must be [batch, length] or [dimensions, batch, length].")
    if positions is not None and positions.ndim == 3:
        if positions.shape[2] != columns:
            raise ValueError(f"position_ids has {positions.shape[2]} columns, and the prompt {columns}; pass as many.")
        positions = None  # levels that know no others are given plain ones
    if mask is not None and (mask.ndim != 2 or mask.shape[0] != len(ids)):
        raise ValueError(f"attention_mask must be [batch, length], [{len(ids)}, {columns}], got {list(mask.shape)}.")
    if uncounted and width == columns - uncounted:
        width = columns
        mask = None if mask is None else torch.cat([mask.new_ones(mask.shape[0], uncounted), mask], dim=1)
    if width is not None and width < columns:
        raise ValueError(
            f"attention_mask has {width} columns and the prompt has {columns}; give one for each, those in a cache too."
        )
    mask = None if mask is None else mask[:, :columns].long().cpu()
    if positions is None or positions.shape[1] != columns:
        full = torch.ones(len(ids), columns, dtype=torch.long) if mask is None else mask
        positions = (full.cumsum(-1) - 1).clamp(min=0)
    if positions.shape[0] != len(ids):
        positions = positions.expand(len(ids), -1)
    return Context(ids, Prompt(columns, mask, positions.long().cpu(), embeds, hidden))


def _comes_before(cache: Any) -> bool:
    """Whether plain generation takes ids and embeddings for what comes after a cache, and never for all of the text."""
    return cache is not None and counts_nothing(cache)


def _without_ids(count: int, embeds: torch.Tensor | None, cache: Any, width: int | None) -> int:
    """Leading columns of the prompt that have no ids, and get stand-ins.

    Args:
        count: columns of the given ids; embeds: `[B, E, H]` or None.
        cache: the caller's, or None; width: columns of the mask, None where there was none.

    Raises:
        ValueError: as `context_of`.
    """
    past = 0 if cache is None else tokens_held(cache)
    if embeds is None:
        # Where only the new ids were passed, those of what the cache holds are not known.
        return past if past and check_prompt(cache, count, width) else 0
    columns, before = embeds.shape[1], _comes_before(cache)
    if past >= columns and not before:
        raise ValueError(
            f"inputs_embeds has {columns} columns and {GENERATION_CACHE} holds {past} tokens already; embeddings "
            "are those of the whole prompt, what the cache holds included, and at least one must be new."
        )
    if count not in (0, columns):
        raise ValueError(
            f"inputs_embeds has {columns} columns and input_ids {count}; where both are given, "
            "assistant_models need an id for each embedding."
        )
    return columns - count + (past if before else 0)
