# SPDX-License-Identifier: Apache-2.0
"""The modules of a model and what they hold, in a tenth of the time that torch's generators within generators take.

A call of generate() looks at them a dozen times before its first pass, and an answer of a few tokens of a small model
takes no longer than a few dozen of such walks.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain
from typing import Any

from torch import nn


def modules_of(model: Any) -> list[Any]:
    """A module and all inside it, each once, in the order of its `modules()`."""
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


def parameters_in(modules: Iterable[nn.Module]) -> list[nn.Parameter]:
    """What these modules themselves hold, in their order; what several hold is there several times."""
    held = chain.from_iterable([module._parameters.values() for module in modules])
    return [parameter for parameter in held if parameter is not None]
