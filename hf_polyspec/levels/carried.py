# SPDX-License-Identifier: Apache-2.0
"""What one call leaves to the next under `num_assistant_tokens_schedule="heuristic"`.

transformers writes the last length of a draft into the assistant's generation config. Nothing of the caller's is
written to here: what was learnt of an assistant is kept beside it, for as long as it lives.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary


@dataclass
class CarriedSizes:
    """Sizes that the last generation of an assistant ended with.

    Attributes:
        asked: the sizes that the caller had asked for; other ones begin anew.
        draft_tokens: length of drafts, None before the first.
        depth: of trees, likewise.
    """

    asked: tuple[int, ...]
    draft_tokens: int | None = None
    depth: int | None = None


_sizes: WeakKeyDictionary[Any, CarriedSizes] = WeakKeyDictionary()


def carried_sizes(assistant: Any, *asked: int) -> CarriedSizes:
    """What is remembered of an assistant that is asked for such sizes; to be written to when a generation ends."""
    found = _sizes.get(assistant)
    if found is None or found.asked != asked:
        found = _sizes[assistant] = CarriedSizes(asked)
    return found
