# SPDX-License-Identifier: Apache-2.0
"""Weights that transformers lets two modules share, and how to tell it that they do not."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any


def untie(model: Any, modules: Collection[str]) -> bool:
    """Has a model load and keep its own weights in modules that it would else share with others.

    For modules that a checkpoint brings in another form than the one they would be tied to: their config was copied
    from a model in which they were tied.

    Args:
        model: a transformers model; its config says afterwards what is true of it.
        modules: their names.

    Returns:
        Whether one of them was tied.
    """
    # from the tied weight's name to that of the weight it is tied to
    tied = getattr(model, "all_tied_weights_keys", None)
    if not isinstance(tied, dict):
        return False
    kept_apart = [name for name in tied if name.rpartition(".")[0] in modules]
    for name in kept_apart:
        del tied[name]
    if kept_apart:
        model.config.tie_word_embeddings = False
    return bool(kept_apart)
