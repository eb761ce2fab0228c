# SPDX-License-Identifier: Apache-2.0
"""What models make of inputs besides text: the encoder of each its own, and no columns that stand for no id."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ..errors import TARGET, UncheckableError
from .release import forward_arguments, inner_model, input_device, parameters_of, with_cache
from .states import empty_cache

_ENCODE, _EXPAND = "_prepare_multimodal_encoder_kwargs_for_generation", "_expand_multimodal_outputs"
"""Methods with which generate() encodes pictures before anything is read, in releases that do so."""
_ENCODED = "mm_encoder_outputs"

PLACES = ("image_token_id", "image_token_index", "video_token_id", "audio_token_id", "audio_token_index")
"""Where configs name the ids that stand for pictures and sounds in a text."""


@dataclass(frozen=True)
class Sights:
    """What a caller passed besides text, as it was before generate() encoded it for the target.

    Attributes:
        given: arguments of generate() by name; ids: `[B, L]` of the prompts, each `copies` times.
    """

    given: Mapping[str, Any]
    ids: torch.Tensor
    copies: int

    @torch.no_grad()
    def by(self, model: Any, first: Mapping[str, Any]) -> dict[str, Any] | None:
        """What a level's own encoder makes of it, for the pass that reads the prompt.

        Args:
            model: of the target's class, with numbers of its own; first: what the target's own such pass is given.

        Returns:
            None where the level cannot see it, or as another number of tokens than the target.
        """
        inner, device = inner_model(model), input_device(model)
        given = {
            name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in self.given.items()
        }
        try:
            getattr(inner, _ENCODE)(given)
            made = given[_ENCODED]
            if self.copies > 1:
                made = getattr(inner, _EXPAND)(self.ids[:: self.copies].to(device), made, expand_size=self.copies)
            alike = _counts(made) == _counts(first[_ENCODED])
        except Exception:
            return None
        return {**first, _ENCODED: made} if alike else None


def _counts(outputs: Any) -> dict[str, list[int]]:
    """Tokens of every picture, by kind."""
    return {kind: [len(one) for one in output.pooler_output] for kind, output in outputs.items()}


def shown(model: Any, given: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments that generate() will encode for the target and drop; none in releases that hand them on."""
    inner = inner_model(model)
    if not (hasattr(inner, _ENCODE) and hasattr(inner, _EXPAND)):
        return {}
    readers = (getattr(inner.base_model, f"get_{kind}_features", None) for kind in ("image", "video"))
    names = {name for reader in readers if reader is not None for name in parameters_of(reader)}
    return {name: value for name, value in given.items() if name in names and value is not None}


@torch.no_grad()
def check_columns(model: Any, first: Mapping[str, Any], ids: torch.Tensor) -> None:
    """Refuse inputs that a target puts into its cache beside the text, as GIT does with pictures.

    Only classes without an id that stands for such inputs are tried, on one token a row.

    Args:
        model: the target; first: what the pass that reads the prompt is given; ids: `[B, L]` of the prompt.

    Raises:
        UncheckableError: names the class and the inputs.
    """
    inner = inner_model(model)
    raw = [name for name, value in first.items() if isinstance(value, torch.Tensor)]
    placed = any(isinstance(getattr(inner.config, name, None), int) for name in PLACES)
    if not raw or placed or "mm_encoder_outputs" in forward_arguments(model) or not ids.shape[1]:
        return
    cache = empty_cache(model)
    try:
        model(input_ids=ids[:, -1:], **first, use_cache=True, return_dict=True, **with_cache(model, cache))
        held = int(cache.get_seq_length())
    except Exception:
        return  # it wants the rest of the prompt, and has a place for them there
    if held > 1:
        raise UncheckableError(
            f"{TARGET} ({type(inner).__name__}) keeps {held - 1} columns for {' and '.join(raw)} in its cache that "
            "stand for no id of the prompt, which chains cannot follow; leave assistant_models out for such prompts.",
            TARGET,
        )
