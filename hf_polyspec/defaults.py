# SPDX-License-Identifier: Apache-2.0
"""Values that options have unless somebody sets them, and the checks of a number that several rooms need."""

from __future__ import annotations

import math
from typing import Any

from torch import nn

DEFAULT_DRAFT_TOKENS = 5
DEFAULT_BLOCK_SIZE = 8
DEFAULT_DIRECT_TOKENS = 4
DEFAULT_TREE_DEPTH = 5
DEFAULT_TREE_TOP_K = 8
ONE, REPLICATED, SHARDED = "one", "replicated", "sharded"
"""Where a level below a target that processes share runs: in the first of them, in each by itself, split as it is."""


def require_count(name: str, value: Any, least: int = 1, hint: str = "") -> None:
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < least):
        raise ValueError(f"{name} must be a whole number of at least {least}{hint}, got {value!r}.")


def require_temperature(name: str, value: Any) -> None:
    """Raises a `ValueError` for what is neither None nor a finite number above 0."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if value is not None and not (number and 0 < value < math.inf):
        raise ValueError(f"{name} must be a number above 0, got {value!r}.")


def require_choice(name: str, value: Any, choices: tuple[Any, ...]) -> None:
    if value not in choices:
        listed = ", ".join(repr(choice) for choice in choices if choice is not None)
        raise ValueError(f"{name} must be one of {listed}, got {value!r}.")


def require_places(value: Any) -> None:
    """Raises a `ValueError` for what is neither a placement nor a list of them."""
    several = isinstance(value, (list, tuple))
    for place in value if several else [value]:
        require_choice("polyspec_placement", place, ("auto", ONE, REPLICATED, SHARDED))


def require_model(function: str, model: Any) -> None:
    """Raises a `TypeError` for what is no torch module, with the name of the function it was given to."""
    if not isinstance(model, nn.Module):
        given = f"the class {model.__name__}" if isinstance(model, type) else f"{model!r} ({type(model).__name__})"
        raise TypeError(f"{function}() takes a model, got {given}.")
