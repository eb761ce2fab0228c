# SPDX-License-Identifier: Apache-2.0
"""Which target layers a published head reads: two conventions that differ by one, told apart.

A number k in a config means either "the input of layer k" (vLLM, speculators), which is `hidden_states[k]`, or "the
output of layer k" (SGLang, SpecForge, ModelOpt), which is `hidden_states[k + 1]`.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

# Where the lists stand, and what a number means there when the list itself does not tell.
_INPUTS, _OUTPUTS = "inputs", "outputs"
_TOP_LEVEL_KEYS = (
    ("eagle_aux_hidden_state_layer_ids", _INPUTS),
    ("target_layer_ids", _OUTPUTS),
    ("aux_hidden_states_layer_ids", _OUTPUTS),
)
_NESTED_KEYS = ("eagle_aux_hidden_state_layer_ids", "target_layer_ids")


def listed_layers(config: dict[str, Any], speculators: bool) -> list[int] | None:
    """Finds a head's layer list in its config and translates it into `hidden_states` indices.

    A list that is one of the two defaults, (2, L//2, L-3) for inputs or (1, L//2-1, L-4) for outputs, tells its own
    convention. Any other is read by where it stands, with a warning.

    Args:
        config: The checkpoint's config.
        speculators: Whether it has the speculators layout, where numbers are inputs.

    Returns:
        Indices into `hidden_states`, or `None` if the config lists no layers.

    Raises:
        ValueError: If the list is not a list of layer numbers.
    """
    found = _find_list(config)
    if found is None:
        return None
    name, ids, convention = found
    if any(not isinstance(index, int) or isinstance(index, bool) or index < 0 for index in ids):
        raise ValueError(f"`{name}` must list layer numbers, got {list(ids)}.")
    if speculators:
        convention = _INPUTS
    known = _default_convention(ids)
    if known is None and not speculators:
        meaning = "inputs of these layers" if convention == _INPUTS else "outputs of these layers"
        warnings.warn(
            f"The head's `{name}` {list(ids)} is no default list; taken to mean the {meaning}. If acceptance is poor "
            "pass feature_layer_ids (indices into the target's hidden_states) to from_pretrained.",
            UserWarning,
            stacklevel=2,
        )
    shift = 1 if (known or convention) == _OUTPUTS else 0
    return [index + shift for index in ids]


def _find_list(config: dict[str, Any]) -> tuple[str, Sequence[Any], str] | None:
    nested = config.get("eagle_config")
    for name in _NESTED_KEYS:
        ids = nested.get(name) if isinstance(nested, dict) else None
        if ids:
            return f"eagle_config.{name}", ids, _OUTPUTS
    for name, convention in _TOP_LEVEL_KEYS:
        ids = config.get(name)
        if ids:
            return name, ids, convention
    return None


def _default_convention(ids: Sequence[int]) -> str | None:
    """Returns the convention under which the list is the default of some target depth, if any."""
    if len(ids) != 3:
        return None
    low, mid, high = ids
    if low == 2 and mid == (high + 3) // 2:
        return _INPUTS
    if low == 1 and mid == (high + 4) // 2 - 1:
        return _OUTPUTS
    return None
