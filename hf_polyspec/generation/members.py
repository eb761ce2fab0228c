# SPDX-License-Identifier: Apache-2.0
"""Whose turn it is: the members of a chain that keep the state of one generation, lent to one at a time."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from ..host.generation import CandidateGenerator
from ..host.peculiar import as_target
from ..levels.base import Drafter
from ..models.companions import with_companions

_lock = threading.Lock()
_busy: set[int] = set()
"""Drafters in a generation at this moment, by id: they live at least as long as it does."""


def members(target: Any, assistants: Any, places: Sequence[str] = ()) -> Any:
    """`assistant_models` with everything that is given by name made or loaded (`models.assistants.by_name`), and models
    that only draft beside another one as drafters (`models.companions`).

    Args:
        target: the model; assistants: as the caller gave them; places: see `by_name`.
    """
    from ..models.assistants import by_name  # loaders of every kind, which most chains never need

    made = by_name(target, assistants, places)
    if not isinstance(made, (list, tuple)):
        return made
    return with_companions(target, [as_target(target, one) for one in made])


def leaves_choice(assistants: Any, plan: Any) -> bool:
    """Whether `assistant_models` is "auto".

    Raises:
        ValueError: a plan is given beside it.
    """
    if not isinstance(assistants, (str, list, tuple)):
        return False
    from ..auto import is_auto

    if not is_auto(assistants):
        return False
    if plan is not None:
        raise ValueError('assistant_models="auto" chooses by itself and a polyspec_plan names assistants; give one.')
    return True


@contextmanager
def lent(assistants: Sequence[Any]) -> Iterator[list[Any]]:
    """The members as they are to be used for one generation.

    Models and heads keep nothing between two passes, and any number of generations may use them. A drafter object keeps
    the text of its generation. Where another one (of another thread, as a rule) has it, a copy of its own is used, if
    the drafter makes one (`Drafter.for_another`).

    Args:
        assistants: checked by `check_assistants`.

    Raises:
        ValueError: a drafter is in use and cannot be copied.
    """
    taken: list[int] = []
    found = list(assistants)
    try:
        for i, one in enumerate(found):
            if not isinstance(one, (Drafter, CandidateGenerator)):
                continue
            if _take(one):
                taken.append(id(one))
                continue
            other = one.for_another() if isinstance(one, Drafter) else None
            if other is None:
                raise ValueError(
                    f"assistant_models[{i}] ({type(one).__name__}) serves one generation at a time and is in use by "
                    "another one; give each thread one of its own."
                )
            found[i] = other
        yield found
    finally:
        with _lock:
            _busy.difference_update(taken)


def _take(drafter: Any) -> bool:
    """Marks a drafter as in use; False if it is already."""
    with _lock:
        if id(drafter) in _busy:
            return False
        _busy.add(id(drafter))
        return True
