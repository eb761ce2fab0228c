# SPDX-License-Identifier: Apache-2.0
"""Rotary frequencies that depend on the length of a text, which one pass shares among all its columns.

`longrope` has one set of frequencies up to a length and another beyond it; `dynamic` has other ones at every length
beyond the model's own. A pass over several tokens must not reach across such a length, or its first tokens would be
read with the frequencies of its last.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from transformers.cache_utils import DynamicCache

from .release import GENERATION_CACHE, inner_model


def _ropes(config: Any) -> Iterator[dict[str, Any]]:
    for name in ("rope_parameters", "rope_scaling"):
        found = getattr(config, name, None)
        if isinstance(found, dict):
            yield from (part for part in (found, *found.values()) if isinstance(part, dict))


def _lengths(model: Any) -> tuple[int | None, int | None]:
    """After which length frequencies change once, and after which they change at every length; None for never."""
    config = inner_model(model).config.get_text_config(decoder=True)
    once = always = None
    for rope in _ropes(config):
        kind = rope.get("rope_type", rope.get("type"))
        own = rope.get("original_max_position_embeddings") or getattr(config, "original_max_position_embeddings", None)
        if kind == "longrope":
            once = own or config.max_position_embeddings
        elif kind == "dynamic":
            always = config.max_position_embeddings
    return once, always


def turns_stay(model: Any) -> bool:
    """Whether the angles at a position are the same at every length."""
    return _lengths(model) == (None, None)


def gate(model: Any, padding: int) -> Callable[[int], int | None] | None:
    """How far a pass may reach: given a row's columns, the most it may have after a pass; None for any number.

    Args:
        model: the target; padding: fewest columns of left padding in any row, which have no position.

    Returns:
        None where no length matters.
    """
    once, always = _lengths(model)
    if once is None and always is None:
        return None
    # Positions decide about frequencies, columns about the cache.
    ends = set() if once is None else {once, once + padding}

    def reach(columns: int) -> int | None:
        if always is not None and columns > always + padding:
            return columns
        limits = [*ends, *([] if always is None else [always + padding])]
        return min((end for end in limits if end >= columns), default=None)

    return reach


def reads_anew(model: Any) -> int | None:
    """After which columns plain generation throws its cache away and reads the text again; None for never."""
    inner = inner_model(model)
    once, _ = _lengths(model)
    if once is None:
        return None
    cache = DynamicCache()
    cache.update(torch.zeros(1, 1, 1, 1), torch.zeros(1, 1, 1, 1), 0)
    ids = torch.zeros(1, once + 1, dtype=torch.long)
    try:
        made = inner.prepare_inputs_for_generation(ids, next_sequence_length=1, **{GENERATION_CACHE: cache})
    except Exception:
        return None
    return once if made.get(GENERATION_CACHE) is None else None


def crosses(end: int, held: list[list[int]], wanted: list[list[int]]) -> bool:
    """Whether a cache is of a time before the length at which plain generation reads a text anew, or after it."""
    had, has = (max(map(len, rows), default=0) > end for rows in (held, wanted))
    return bool(held) and had is not has
