# SPDX-License-Identifier: Apache-2.0
"""Which target layers a published head reads: two conventions that differ by one, told apart.

A number k in a config means either "the input of layer k" (vLLM, speculators), which is `hidden_states[k]`,
or "the output of layer k" (SGLang, SpecForge, ModelOpt), which is `hidden_states[k + 1]`.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

_INPUTS, _OUTPUTS = "inputs", "outputs"
_KEY = "eagle_aux_hidden_state_layer_ids"

# Where lists stand, and what a number means there when the list itself does not tell.
_PLACES = (
    (("eagle_config", _KEY), _OUTPUTS),
    (("eagle_config", "target_layer_ids"), _OUTPUTS),
    ((_KEY,), _INPUTS),
    (("target_layer_ids",), _OUTPUTS),
    (("aux_hidden_states_layer_ids",), _OUTPUTS),
)


def listed_layers(config: dict[str, Any], speculators: bool) -> list[int] | None:
    """Finds a head's layer list in its config and translates it into `hidden_states` indices.

    A list that is one of the two defaults, (2, L//2, L-3) for inputs or (1, L//2-1, L-4) for outputs, tells
    its own convention, and so do two lists that differ by one. Any other is read by where it stands, with a
    warning.

    Args:
        config: The checkpoint's config.
        speculators: Whether it has the speculators layout, where numbers are inputs.

    Returns:
        Indices into `hidden_states`, or `None` if the config lists no layers.

    Raises:
        ValueError: If the list is not a list of layer numbers.
    """
    found = [(place, _lookup(config, place), meaning) for place, meaning in _PLACES]
    lists = [(".".join(place), ids, meaning) for place, ids, meaning in found if ids]
    if not lists:
        return None
    name, ids, meaning = lists[0]
    for other_name, other, _ in lists:
        if any(not isinstance(index, int) or isinstance(index, bool) or index < 0 for index in other):
            raise ValueError(f"`{other_name}` must list layer numbers, got {list(other)}.")
    if speculators:
        return list(ids)
    for _, other, _ in lists[1:]:
        if [index + 1 for index in ids] == list(other):
            return list(other)
    meaning = _default_convention(ids) or _guessed(name, ids, meaning)
    return [index + (meaning == _OUTPUTS) for index in ids]


def _guessed(name: str, ids: Sequence[int], meaning: str) -> str:
    warnings.warn(
        f"The head's `{name}` {list(ids)} is no default list; taken to mean the {meaning} of these layers. "
        "If acceptance is poor pass feature_layer_ids (indices into the target's hidden_states) to "
        "from_pretrained.",
        UserWarning,
        stacklevel=2,
    )
    return meaning


def _lookup(config: Any, place: Sequence[str]) -> Sequence[Any] | None:
    for key in place:
        config = config.get(key) if isinstance(config, dict) else None
    return config if isinstance(config, (list, tuple)) and config else None


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
