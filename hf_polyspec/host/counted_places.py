# SPDX-License-Identifier: Apache-2.0
"""Models that find positions by counting the ids of a pass that are not the padding's.

Plain generation has them read the prompt in one pass and then one id in each, so a padding id that the text holds moves
nothing behind it. In a pass of several columns it would, and each column is counted as in a pass of its own.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from .release import parameters_of
from .walking import modules_of, once_of

_METHOD = "create_position_ids_from_input_ids"
"""(ids, the padding's id, columns before them), as transformers' classes with such positions have it."""
_locks: WeakKeyDictionary[nn.Module, threading.RLock] = WeakKeyDictionary()


class CountedPlaces:
    """The modules of a model that count so.

    Args:
        model: they are looked for once.
    """

    def __init__(self, model: nn.Module) -> None:
        self._modules = once_of(model, "counting", _counting)

    @contextmanager
    def of(self, grown: list[int]) -> Iterator[None]:
        """During a pass, columns behind the prompt are counted one by one.

        Args:
            grown: columns that each row of the pass ends behind the prompt.
        """
        if not self._modules:
            yield
            return
        with ExitStack() as stack:
            for module in self._modules:
                stack.enter_context(_locks.setdefault(module, threading.RLock()))
                stack.enter_context(_put(module, _by_column(getattr(module, _METHOD), max(0, *grown, 0))))
            yield


def _counting(model: nn.Module) -> list[Any]:
    parts = modules_of(model)
    kinds = {kind for kind in set(map(type, parts)) if hasattr(kind, _METHOD)}
    having = [part for part in parts if _METHOD in part.__dict__ or type(part) in kinds]
    return [part for part in having if len(parameters_of(getattr(part, _METHOD))) == 3]


@contextmanager
def _put(module: nn.Module, method: Callable[..., Any]) -> Iterator[None]:
    values = vars(module)
    before = {name: value for name, value in values.items() if name == _METHOD}
    values[_METHOD] = method
    try:
        yield
    finally:
        values.pop(_METHOD, None)
        values.update(before)


def _by_column(own: Callable[..., torch.Tensor], grown: int) -> Callable[..., torch.Tensor]:
    parameters = inspect.signature(own)

    def places(*args: Any, **kwargs: Any) -> torch.Tensor:
        bound = parameters.bind(*args, **kwargs)
        bound.apply_defaults()
        ids, padding, past = bound.arguments.values()
        together = max(0, ids.shape[1] - grown)
        if not bool((ids == padding).any()):
            return own(ids, padding, past)
        pieces = [own(ids[:, :together], padding, past)] if together else []
        pieces += [own(ids[:, j : j + 1], padding, past + j) for j in range(together, ids.shape[1])]
        return torch.cat(pieces, dim=1)

    return places
