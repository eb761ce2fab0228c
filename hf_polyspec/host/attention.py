# SPDX-License-Identifier: Apache-2.0
"""transformers' attention functions by name, its masks, rotary variants and activations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers import AttentionInterface, AttentionMaskInterface
from transformers.activations import ACT2FN
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS, dynamic_rope_update
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

__all__ = [
    "ACT2FN",
    "ROPE_INIT_FUNCTIONS",
    "ROWS_APART",
    "attention_name",
    "dynamic_rope_update",
    "plain_sdpa",
    "register_attention",
    "sdpa_attention_forward",
]

ROWS_APART = "polyspec_rows"
"""What models call their attention during a pass over rows of their own, see `spans`; outside of one it is sdpa."""


def register_attention(name: str, function: Callable[..., Any]) -> None:
    """Let models choose `function` by `set_attn_implementation(name)`, with the masks that sdpa gets."""
    AttentionInterface.register(name, function)
    AttentionMaskInterface.register(name, sdpa_mask)


def plain_sdpa() -> Callable[..., Any]:
    """What models with `attn_implementation="sdpa"` call at this moment."""
    found: Callable[..., Any] = ALL_ATTENTION_FUNCTIONS["sdpa"]
    return found


def attention_name(config: Any) -> str:
    """Which attention function a model's config has chosen; eager where it chose none."""
    name = getattr(config, "_attn_implementation", None) or "eager"
    return "sdpa" if name == ROWS_APART else name  # a pass is under way, perhaps in another thread
