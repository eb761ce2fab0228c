# SPDX-License-Identifier: Apache-2.0
"""The cache that a model makes for itself where generate() prepares none, as plain generation's output has it."""

from __future__ import annotations

from typing import Any

from transformers.generation import utils

from .callers_cache import write_cache
from .carried import carried_by
from .release import CACHE_NAMES
from .runner import ModelRunner
from .states import StateCache

_NAMES = {*CACHE_NAMES, *getattr(utils, "ALL_CACHE_NAMES", ())}
"""Under which generate() looks for what it puts into its output as the cache; for some models a list of tensors."""


def makes_own_cache(model: Any) -> bool:
    """Whether passes of a model return a cache that they have made, of a class of the model's own or of none."""
    carried = carried_by(model)
    return carried.cache_class is not None or carried.argument in _NAMES


def own_cache(runner: ModelRunner) -> Any:
    """What the last pass of plain generation would have returned as the model's cache; for after `settle`.

    The runner's own is used up.
    """
    held = runner.cache
    assert isinstance(held, StateCache)
    kind = held.carried.cache_class
    if kind is None:
        return held.argument
    made = kind()
    vars(made).update({name: vars(held)[name] for name in held.carried.attributes})
    write_cache(held, made, 0)
    return made
