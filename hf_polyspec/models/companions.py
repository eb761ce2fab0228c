# SPDX-License-Identifier: Apache-2.0
"""Models that only draft, and only beside another one whose hidden states they read, as members of a chain."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from ..eagle.modeling import EagleHead
from ..host.compatibility import check_vocabularies
from ..host.dflash import DFlash, is_dflash
from ..host.encoded import is_encoder_decoder
from ..host.keyless import Keyless, is_keyless
from ..host.release import inner_model
from ..levels.base import Drafter
from ..levels.dflash import DFlashDrafter
from ..levels.keyless import KeylessDrafter
from ..levels.names import name_of


def with_companions(target: Any, assistants: Sequence[Any]) -> list[Any]:
    """Members of a chain, those that only draft beside the level above them as drafters under that level.

    Args:
        target: the model generate() was called on; assistants: its members, none of them a name.

    Raises:
        ValueError: one does not fit the level above it; the sentence says which and why.
    """
    return [
        _companion(one, above, f"assistant_models[{place}]") or one
        for place, (above, one) in enumerate(zip([target, *assistants], assistants, strict=False))
    ]


def is_companion(member: Any) -> bool:
    """Whether a member is a model that only drafts beside another one."""
    model = inner_model(member)
    return not isinstance(member, (type, Drafter)) and (is_dflash(model) or is_keyless(model))


def _companion(member: Any, above: Any, role: str) -> Drafter | None:
    if not is_companion(member):
        return None
    model = inner_model(member)
    name = name_of(member) or type(model).__name__
    try:
        _check_above(above)
        if is_keyless(model):
            check_vocabularies(above, model, role)
            return KeylessDrafter(Keyless(model, above), name)
        return DFlashDrafter(DFlash(model, above), name)
    except ValueError as error:
        raise ValueError(f"{role} ({name}) drafts beside the level above it, and {str(error).rstrip('.')}.") from error


def _check_above(above: Any) -> None:
    if not isinstance(above, nn.Module) or isinstance(above, EagleHead) or not hasattr(inner_model(above), "generate"):
        raise ValueError("that is no causal language model; put it under one")
    if is_encoder_decoder(above):
        raise ValueError("that has an encoder, which it knows nothing of; put it under a decoder-only model")
