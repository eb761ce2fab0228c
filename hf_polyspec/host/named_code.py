# SPDX-License-Identifier: Apache-2.0
"""What the code of transformers' classes names: to find a part that does something without running it."""

from __future__ import annotations

import inspect
from types import CodeType
from typing import Any

from transformers import cache_utils

_UPDATES = frozenset(
    name for name in dir(getattr(cache_utils, "LinearAttentionLayer", object)) if name.startswith("update_")
)
"""Methods by which a model writes a state into a layer of its cache; a cache has them by the same names."""


def state_writers(model: Any) -> list[Any]:
    """Modules of a model with a method that writes a state into a cache."""
    kinds = {kind for kind in map(type, model.modules()) if _writes(kind)}
    return [part for part in model.modules() if type(part) in kinds]


def _writes(kind: type[Any]) -> bool:
    return any(not _UPDATES.isdisjoint(names_in(method)) for method in vars(kind).values())


def names_in(function: Any) -> list[str]:
    """Names in a function's code, and in that of functions within it; words it is written with, too."""
    code = getattr(inspect.unwrap(function), "__code__", None) if callable(function) else None
    found, left = [], [] if code is None else [code]
    while left:
        one = left.pop()
        found += [*one.co_names, *(word for word in one.co_consts if isinstance(word, str))]
        left += [constant for constant in one.co_consts if isinstance(constant, CodeType)]
    return found
