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
_GUESSES = {".".join(place): meaning for place, meaning in _PLACES}


def listed_layers(config: dict[str, Any], speculators: bool) -> list[int] | None:
    """Finds a head's layer list in its config and translates it into `hidden_states` indices.

    A list that is one of the two defaults, (2, L//2, L-3) for inputs or (1, L//2-1, L-4) for outputs, tells
    its own convention, and so do two lists that differ by one or not at all. Any other is read by where it
    stands, with a warning.

    Args:
        config: The checkpoint's config.
        speculators: Whether it has the speculators layout, where numbers are inputs.

    Returns:
        Indices into `hidden_states`, or `None` if the config lists no layers.

    Raises:
        ValueError: If the list is not a list of layer numbers.
    """
    found = _found(config, speculators)
    if found is None:
        return None
    name, ids, meaning = found
    if meaning is None:
        meaning = _GUESSES[name]
        _tell_guess(name, ids, meaning)
    return [index + (meaning == _OUTPUTS) for index in ids]


def unsettled_layers(config: dict[str, Any], speculators: bool) -> list[int] | None:
    """The list as it stands in a config where its convention is a guess, which a target's depth may refute.

    Args:
        config: The checkpoint's config.
        speculators: Whether it has the speculators layout.

    Returns:
        The layer numbers, or `None` where there are none or what they mean is known.

    Raises:
        ValueError: As `listed_layers`.
    """
    found = _found(config, speculators)
    return list(found[1]) if found is not None and found[2] is None else None


def _found(config: dict[str, Any], speculators: bool) -> tuple[str, Sequence[int], str | None] | None:
    """Where a list stands, the list, and what its numbers mean; `None` for a meaning that nothing tells."""
    lists = [(".".join(place), ids) for place, _ in _PLACES if (ids := _lookup(config, place))]
    for name, ids in lists:
        if any(not isinstance(index, int) or isinstance(index, bool) or index < 0 for index in ids):
            raise ValueError(f"`{name}` must list layer numbers, got {list(ids)}.")
    if not lists:
        return None
    name, ids = lists[0]
    if speculators:
        return name, ids, _INPUTS
    for other_name, other in lists[1:]:
        if [index + 1 for index in ids] == list(other):
            return other_name, other, _INPUTS
        if list(ids) == list(other):  # as SGLang and vLLM read them
            return name, ids, _default_convention(ids) or _INPUTS
    return name, ids, _default_convention(ids)


def _tell_guess(name: str, ids: Sequence[int], meaning: str) -> None:
    warnings.warn(
        f"The head's `{name}` {list(ids)} is no default list; taken to mean the {meaning} of these layers. "
        "If acceptance is poor pass feature_layer_ids (indices into the target's hidden_states) to "
        "from_pretrained.",
        UserWarning,
        stacklevel=2,
    )


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
