# SPDX-License-Identifier: Apache-2.0
"""What a model makes of inputs besides text: columns of its cache that stand for no id."""

from __future__ import annotations

from typing import Any

import torch

from .forwarding import Extras
from .release import forward_arguments, inner_model, with_cache
from .states import empty_cache

_PLACES = ("image_token_id", "image_token_index", "video_token_id", "audio_token_id", "audio_token_index")
"""Where configs name the ids that stand for pictures and sounds in a text."""


@torch.no_grad()
def check_columns(model: Any, extras: Extras, ids: torch.Tensor) -> None:
    """Refuse inputs that a target puts into its cache beside the text, as GIT does with pictures.

    Only classes without an id that stands for such inputs are tried, on one token a row.

    Args:
        model: the target; extras: what it is given; ids: `[B, L]` of the prompt.

    Raises:
        ValueError: names the class and the inputs.
    """
    inner = inner_model(model)
    raw = [name for name, value in extras.first.items() if isinstance(value, torch.Tensor)]
    placed = any(isinstance(getattr(inner.config, name, None), int) for name in _PLACES)
    if not raw or placed or "mm_encoder_outputs" in forward_arguments(model) or not ids.shape[1]:
        return
    cache = empty_cache(model)
    try:
        model(input_ids=ids[:, -1:], **extras.first, use_cache=True, return_dict=True, **with_cache(model, cache))
        held = int(cache.get_seq_length())
    except Exception:
        return  # it wants the rest of the prompt, and has a place for them there
    if held > 1:
        raise ValueError(
            f"the target ({type(inner).__name__}) keeps {held - 1} columns for {' and '.join(raw)} in its cache that "
            "stand for no id of the prompt, which chains cannot follow; leave assistant_models out for such prompts."
        )
