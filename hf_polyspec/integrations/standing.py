# SPDX-License-Identifier: Apache-2.0
"""A chain that stands below a model for as long as another program has it, made and checked once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..generation.chain import check_assistants
from ..generation.members import leaves_choice, members
from ..models.assistants import named_assistants


def standing(target: Any, assistants: str | Sequence[Any]) -> Any:
    """`assistant_models` for any number of calls of `generate()`.

    Args:
        target: the model; assistants: names with `+` between them, the slowest level first, or a list as
            `generate(assistant_models=...)` takes it. "auto" stays what it is: it measures in the first call and
            chooses in each.

    Raises:
        ValueError, TypeError: the chain cannot work.
    """
    if isinstance(assistants, str):
        assistants = named_assistants(assistants.split("+"))
    if leaves_choice(assistants, None):
        check_assistants(target, [])
        return assistants
    return check_assistants(target, members(target, assistants))
