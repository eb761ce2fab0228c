# SPDX-License-Identifier: Apache-2.0
"""Standing in for transformers' generate_batch(), where this release has one."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

from transformers import GenerationMixin

from .patching import Door, Patch
from .release import parameters_of

_NAME = "generate_batch"
_patch: Patch | None = None
_inherited = False


def patch_batches(door: Door, extra: tuple[str, ...]) -> None:
    """Stand in for every model's generate_batch(), where there is one; twice changes nothing."""
    global _patch, _inherited
    found: Any = getattr(GenerationMixin, _NAME, None)
    if found is None or (_patch is not None and _patch.on and found is _patch.function):
        return
    if _patch is not None:
        _patch.on = False  # buried under somebody else's
    _inherited = _NAME not in vars(GenerationMixin)
    _patch = Patch(found, door, extra)
    setattr(GenerationMixin, _NAME, _patch.function)


def unpatch_batches() -> None:
    """Undo `patch_batches`; what others have put there since stays, and passes through ours as it is."""
    global _patch
    patch, _patch = _patch, None
    if patch is None:
        return
    patch.on = False
    if vars(GenerationMixin).get(_NAME) is not patch.function:
        return
    if _inherited:
        delattr(GenerationMixin, _NAME)
    else:
        setattr(GenerationMixin, _NAME, patch.original)


def batch_arguments(below: Any, args: Sequence[Any]) -> dict[str, Any]:
    """Positional arguments of the generate_batch() `below` by name."""
    taken = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.POSITIONAL_ONLY)
    names = [p.name for p in parameters_of(below).values() if p.kind in taken and p.name != "self"]
    return dict(zip(names, args, strict=False))
