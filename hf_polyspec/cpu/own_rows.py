# SPDX-License-Identifier: Apache-2.0
"""What compiled blocks are told of a pass over rows that each have a region of keys and values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from hf_polyspec.host.ragged_cache import RaggedCache
from hf_polyspec.host.span import Span
from hf_polyspec.host.spans import pass_under_way

if TYPE_CHECKING:
    from hf_polyspec.cpu.compiled.whole_block import Apart


def apart_of(past: Any, group: int) -> Apart | None:
    """Where the pass under way reads and writes, made once a pass; None for other caches.

    Args:
        past: The cache; group: query heads that read the same keys.
    """
    under_way = pass_under_way() if type(past) is RaggedCache else None
    if under_way is None:
        return None
    found: Apart | None = under_way.kept.get(group)
    if found is None:
        from hf_polyspec.cpu.compiled.whole_block import Apart

        found = Apart(jobs_of(under_way.spans, group), under_way.groups[None].written())
        under_way.kept[group] = found
    return found


def jobs_of(spans: Sequence[Span], group: int) -> Tensor:
    """Parts of attention over rows that only go on, see `jobs_apart`."""
    from hf_polyspec.cpu.compiled.attention import jobs_apart

    return jobs_apart([(span.first, span.count, span.base, span.end) for span in spans], group)


def takes_rows(past: RaggedCache, index: int, shape: tuple[int, int, int, int], x: Tensor, mask: Tensor | None) -> bool:
    """Whether a compiled block can do a layer's part of the pass under way: rows only go on, and there are buffers.

    A layer that holds nothing yet can be given some (`RaggedCache.open`).

    Args:
        past, index: The cache and which of its layers; shape: of the new keys; x: has their dtype.
        mask: What the layer was given for one.
    """
    under_way = pass_under_way()
    if under_way is None or mask is not None or not under_way.plain or index > len(past.layers):
        return False
    if (past.windows[index] if index < len(past.windows) else None) is not None:
        return False
    layer: Any = past.layers[index] if index < len(past.layers) else None
    return layer is None or layer.keys is None or bool(layer.holds(shape, x))
