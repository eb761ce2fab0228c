# SPDX-License-Identifier: Apache-2.0
"""Moments in which nothing but this library runs in a thread, so that what was looked through once is as it was.

A pass of a fused model begins with a look at all that its numbers depend on: modules, hooks, settings, weights. On a
small model that takes a tenth of the pass. Between two passes of a middle that collects a block nobody else's code runs
where there is none: no processor, no drafter and no hook of the caller's. Such a stretch is a moment, and one look is
enough for it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import local
from types import FunctionType
from typing import Any

import torch
from torch import overrides
from torch.utils import _python_dispatch
from transformers import PreTrainedModel

from .hooks import is_hooked
from .walking import modules_of

_KNOWN = frozenset(name.partition(".")[0] for name in (PreTrainedModel.__module__, torch.__name__, __name__))
"""Packages whose modules run no code of a user's."""
_MODES: tuple[Callable[[], list[Any]] | None, ...] = (
    getattr(overrides, "_get_current_function_mode_stack", None),
    getattr(_python_dispatch, "_get_current_dispatch_mode_stack", None),
)
"""What tells the modes that this thread is under: code that is called for each of torch's operations."""


class Moment:
    """One stretch; no two are the same."""

    __slots__ = ()


class _Own(local):
    """Of one thread."""

    moment: Moment | None = None


_own = _Own()


def this_moment() -> Moment | None:
    """The moment that this thread is in, None where anything may have happened since the last look."""
    return _own.moment


@contextmanager
def one_moment() -> Iterator[None]:
    """Within, this thread runs nothing but this library's code; a moment inside another is part of it.

    There is none under a mode of somebody's.
    """
    before = _own.moment
    _own.moment = None if is_under_modes() else before or Moment()
    try:
        yield
    finally:
        _own.moment = before


@contextmanager
def no_moment() -> Iterator[None]:
    """Within, this thread is in no moment: a call that somebody's code began inside one (a signal handler, a finaliser,
    a callback of the garbage collector) looks for itself, and whoever was interrupted looks again."""
    before = _own.moment
    _own.moment = None
    try:
        yield
    finally:
        _own.moment = before and Moment()


def is_under_modes() -> bool:
    """Whether somebody's code may be called for each of torch's operations; torch's own (that of
    `torch.set_default_device`) aside."""
    return any(stack is None or not all(_is_of(type(mode)) for mode in stack()) for stack in _MODES)


def is_known(module: Any) -> bool:
    """Whether nobody else's code runs where a module is called, those inside it left aside."""
    forward = module.__dict__.get("forward")
    # what takes the place of a forward to compute it in another layout says so by its product
    own = forward is None or hasattr(forward, "product") or _is_of(type(forward))
    written = packages_of(getattr(type(module), "forward", None))
    return own and _is_of(type(module)) and written <= _KNOWN and not is_hooked(module)


def runs_known_code(model: Any) -> bool:
    """Whether nobody else's code runs in a pass of a model: no module, forward or hook of a user's."""
    return all(map(is_known, modules_of(model)))


def is_quiet(thing: Any) -> bool:
    """Whether a streamer or a criterion is of a class of transformers', as it was written, or a list of such: between
    two passes it prints, counts or compares, and no model is another one for that. (It calls a tokenizer, and writes to
    `sys.stdout`, whoever made those.) Other classes say so, by `asks_nobody = True`, which what inherits from them does
    not."""
    kind = type(thing)
    if isinstance(thing, list) and not all(map(is_quiet, thing)):
        return False
    if any(hasattr(kind, name) for name in getattr(thing, "__dict__", ())):
        return False  # something of its own stands in the place of what its class does
    if kind.__dict__.get("asks_nobody") is True:
        return True
    written = [vars(one).values() for one in kind.__mro__ if _is_of(one)]
    methods = (value for values in written for value in values if isinstance(value, FunctionType))
    return _is_hosts(kind) and all(packages_of(method) <= _KNOWN for method in methods)


def packages_of(function: Any) -> set[str]:
    """Packages in which a function, and what it wraps, are written: what it says of itself may be copied from what it
    wraps. An empty name stands for what is not written in Python, as the forward of a script is not."""
    found = {""} if function is None else set()
    while function is not None:
        found.add(str(getattr(function, "__globals__", {}).get("__name__", "")).partition(".")[0])
        function = getattr(function, "__wrapped__", None)
    return found


def _is_hosts(kind: type) -> bool:
    return str(kind.__module__).partition(".")[0] == str(PreTrainedModel.__module__).partition(".")[0]


def _is_of(kind: type) -> bool:
    return str(kind.__module__).partition(".")[0] in _KNOWN
