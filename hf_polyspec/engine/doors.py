# SPDX-License-Identifier: Apache-2.0
"""`enable()` for all that transformers models offer: generate(), and generate_batch() through an engine."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..generation import doors
from ..host.batching import batch_arguments, patch_batches, unpatch_batches
from .batch import generate_batch

_OF_THEIR_LOOP = ("continuous_batching_config", "record_timestamps", "persistent_manager")
_SHOWS = ("progress_bar", "warmup")
"""What changes nothing of the answers, and has no meaning here."""


def enable() -> None:
    """Let every transformers model take `assistant_models=[...]` in `generate()`, and in `generate_batch()`, which then
    is `hf_polyspec.generate_batch`. Calling it twice changes nothing.

    Raises:
        ReleaseError: the installed transformers is newer than any tested one, and changed what a chain relies on.
    """
    doors.enable()
    patch_batches(_door, ("assistant_models",))


def disable() -> None:
    """Undo `enable()`; what others have put in their place since then stays."""
    unpatch_batches()
    doors.disable()


def _door(model: Any, below: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    assistants = kwargs.pop("assistant_models", None)
    if assistants is None:
        return below(*args, **kwargs)
    given = batch_arguments(below, args) | kwargs
    theirs = next((name for name in _OF_THEIR_LOOP if given.get(name)), None)
    if theirs is not None:
        raise ValueError(
            f"{theirs} is of transformers' own continuous batching, and assistant_models run in an Engine; leave it "
            "out. slots=... says how many prompts run at a time."
        )
    given = {name: value for name, value in given.items() if name not in (*_OF_THEIR_LOOP, *_SHOWS)}
    return generate_batch(model, given.pop("inputs", ()), assistant_models=assistants, **given)
