# SPDX-License-Identifier: Apache-2.0
"""The modules of a model and what they hold, in a tenth of the time that torch's generators within generators take.

A call of generate() looks at them a dozen times before its first pass, and an answer of a few tokens of a small model
takes no longer than a few dozen of such walks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain
from threading import local
from types import TracebackType
from typing import Any, TypeVar

from torch import nn

_Found = TypeVar("_Found")


class _Own(local):
    """Of one thread."""

    once: Once | None = None


_own = _Own()


class Once:
    """Within, this thread looks once at each of some models: nothing puts other modules into them meanwhile.

    That is so while a call is checked and its levels are made, and until `end`: what runs after that may do anything.
    So what was found out about a model is remembered, see `once_of`.

    Args:
        model: copies that are finished may be named later, see `also_once`.
    """

    def __init__(self, model: Any) -> None:
        # The models are kept, or another could come to have the number of one that is gone.
        self.looks: dict[int, tuple[Any, dict[str, Any], dict[str, Any]]] = {}
        self.look_at(model, {})

    def look_at(self, model: Any, kept: dict[str, Any]) -> None:
        """This is one of the models; `kept` is what is known of it, and is to be."""
        self.looks.setdefault(id(model), (model, {}, kept))

    def __enter__(self) -> Once:
        self._before, _own.once = _own.once, self
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.end()
        _own.once = self._before

    def end(self) -> None:
        """From now on each look is one."""
        self.looks.clear()


def also_once(model: Any, kept: dict[str, Any]) -> None:
    """Look once at this too, where this thread does at some.

    Args:
        model: which nobody but the caller has.
        kept: what is found out about its modules is kept here from call to call.
    """
    once = _own.once
    if once is not None and once.looks:
        once.look_at(model, kept)


def once_of(model: Any, name: str, look: Callable[[Any], _Found], *, of_modules: bool = True) -> _Found:
    """What is found by looking at a model; remembered where this thread looks once at it.

    Args:
        model: the model; name: of what is found; look: is given the model.
        of_modules: whether it depends on nothing but modules, what is hooked to them, and which weights they hold.
    """
    once = _own.once
    known = None if once is None else once.looks.get(id(model))
    if known is None:
        return look(model)
    found = known[2 if of_modules else 1]
    if name not in found:
        found[name] = look(model)
    return found[name]  # type: ignore[no-any-return]


def modules_of(model: Any) -> list[Any]:
    """A module and all inside it, each once, in the order of its `modules()`; to be read only."""
    return once_of(model, "modules", _walked)


def parameters_of_all(model: Any) -> list[nn.Parameter]:
    """What a module and all inside it hold, in the order of its modules; what several hold is there several times."""
    return once_of(model, "parameters", lambda model: parameters_in(modules_of(model)))


def _walked(model: Any) -> list[Any]:
    found: dict[Any, None] = {}
    waiting: list[Any] = [model]
    while waiting:
        module = waiting.pop()
        if module is not None and module not in found:
            found[module] = None
            if children := module._modules:
                waiting.extend(reversed(children.values()))
    return list(found)


def named_parameters_of(model: Any) -> list[tuple[str, nn.Parameter]]:
    """What a module and all inside it hold by name, in the order of its `named_parameters()`; what several hold is
    there several times."""
    found: list[tuple[str, nn.Parameter]] = []
    met: set[Any] = set()
    waiting: list[tuple[str, Any]] = [("", model)]
    while waiting:
        prefix, module = waiting.pop()
        if module is None or module in met:
            continue
        met.add(module)
        if parameters := module._parameters:
            found += [(prefix + name, held) for name, held in parameters.items() if held is not None]
        if children := module._modules:
            waiting += [(f"{prefix}{name}.", child) for name, child in reversed(children.items())]
    return found


def parameters_in(modules: Sequence[nn.Module]) -> list[nn.Parameter]:
    """What these modules themselves hold, in their order; what several hold is there several times."""
    held = chain.from_iterable([module._parameters.values() for module in modules])
    return [parameter for parameter in held if parameter is not None]
