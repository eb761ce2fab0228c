# SPDX-License-Identifier: Apache-2.0
"""Layers whose state goes on exactly only one column at a time, within passes that read many columns at once.

Some models begin every pass of several columns from an empty state, and others compute it in another way than the one
they take for a single column. Where that is so, only the parts that carry the state on are made to read column by
column, as they do in plain generation; embeddings, attention, experts and the head read all columns at once. Parts
whose scan over columns is a function of their file are spared even that: their own code runs over all columns, with a
scan that goes on from the state.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from types import FunctionType
from typing import Any

import torch

from .carried import carried_by
from .named_code import state_writers
from .release import cache_of, inner_model

NO_LIMIT = (0.0, float("inf"))
_STEP = "mamba_selective_state_update"


class Stepwise:
    """The parts of a model that carry a state on, and how they read on.

    Args:
        model: the level's.
    """

    def __init__(self, model: Any) -> None:
        self.parts = _outermost([*state_writers(inner_model(model)), *(part for part, _ in carried_by(model).places)])

    @property
    def limited(self) -> bool:
        """Whether some part holds the time step of its scan within limits, which it does for several columns only.

        Then passes over several columns are not what plain generation computes, little as a few tokens may show it.
        """
        limits = (getattr(part, "time_step_limit", None) for part in self.parts)
        return any(limit is not None and tuple(limit) != NO_LIMIT for limit in limits)

    @contextmanager
    def reading(self, first: int) -> Iterator[None]:
        """While this runs, passes of this thread read `first` columns at once in these parts, and the others singly."""
        thread, waiting = threading.get_ident(), dict[Any, Any]()

        def before(part: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            wide = _width(args, kwargs)
            if threading.get_ident() != thread or wide <= first:
                return None
            waiting[part] = args, kwargs, wide
            return _cut((args, kwargs), wide, 0, first)

        def after(part: Any, _args: Any, _kwargs: Any, output: Any) -> Any:
            if threading.get_ident() != thread or part not in waiting:
                return None
            args, kwargs, wide = waiting.pop(part)
            at_once = _going_on(part, args, kwargs)
            if at_once is not None:
                more, named = _cut((args, kwargs), wide, first, wide)
                return _joined([output, at_once(*more, **named)], [first, wide - first])
            outputs = [output]
            for column in range(first, wide):
                more, named = _cut((args, kwargs), wide, column, column + 1)
                outputs.append(part.forward(*more, **named))
            return _joined(outputs, [first, *(1 for _ in range(first, wide))])

        with ExitStack() as hooks:
            for part in self.parts:
                hooks.callback(part.register_forward_pre_hook(before, with_kwargs=True).remove)
                hooks.callback(part.register_forward_hook(after, with_kwargs=True).remove)
            yield


def _outermost(parts: list[Any]) -> list[Any]:
    within = {id(inner) for part in parts for inner in part.modules() if inner is not part}
    return [part for part in parts if id(part) not in within]


def _width(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int:
    """Columns of the hidden states `[B, F, H]` that a part is given; 0 where there are none."""
    states = (v for v in (*args, *kwargs.values()) if isinstance(v, torch.Tensor) and v.dim() == 3)
    return next((int(one.shape[1]) for one in states if one.is_floating_point()), 0)


def _cut(value: Any, wide: int, start: int, end: int) -> Any:
    """Arguments for some columns of those that a part was given for `wide`."""
    if isinstance(value, torch.Tensor):
        return value[:, start:end] if value.dim() > 1 and value.shape[1] == wide else value
    if isinstance(value, (tuple, list)):
        return type(value)(_cut(one, wide, start, end) for one in value)
    if isinstance(value, dict):
        return {name: _cut(one, wide, start, end) for name, one in value.items()}
    return value


def _joined(outputs: list[Any], widths: list[int]) -> Any:
    """Outputs for columns one after another as one, whatever else stands beside the hidden states as it was last."""
    last = outputs[-1]
    if isinstance(last, tuple):
        return tuple(_joined([one[place] for one in outputs], widths) for place in range(len(last)))
    pieces = all(
        isinstance(one, torch.Tensor) and one.dim() == 3 and one.shape[1] == width
        for one, width in zip(outputs, widths, strict=True)
    )
    return torch.cat(outputs, dim=1) if pieces else last


def _going_on(part: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Callable[..., Any] | None:
    """A part's own forward with a scan that goes on from its state, None where it has no scan that is known."""
    function = inspect.unwrap(type(part).forward)
    if "forward" in vars(part) or not isinstance(function, FunctionType):  # somebody's, such as accelerate's
        return None
    beside = function.__globals__
    scans = {
        name: _SCANS[name](beside, part, args, kwargs)
        for name in function.__code__.co_names
        if name in _SCANS and name in beside
    }
    if not scans or None in scans.values():
        return None
    variant = FunctionType(
        function.__code__, {**beside, **scans}, function.__name__, function.__defaults__, function.__closure__
    )
    variant.__kwdefaults__ = function.__kwdefaults__
    return variant.__get__(part)


def _selective(beside: Mapping[str, Any], part: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Mamba's scan, whose own begins from nothing: the step that plain generation takes, for one column after another.

    Some classes scan each head by a call of its own.
    """
    step = beside.get(_STEP)
    cache = cache_of({str(place): value for place, value in enumerate((*args, *kwargs.values()))})
    if step is None or not hasattr(cache, "get_recurrent_state"):
        return None
    whole = cache.get_recurrent_state(part.layer_idx)
    turn = iter(range(1 if whole is None else whole.shape[1]))

    def scan(
        hidden: torch.Tensor,
        dt: torch.Tensor,
        A: torch.Tensor,
        B: torch.Tensor,
        C: torch.Tensor,
        D: torch.Tensor | None = None,
        z: torch.Tensor | None = None,
        delta_bias: torch.Tensor | None = None,
        delta_softplus: bool = False,
        **_: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        state = (whole if whole.dim() == 3 else whole[:, next(turn)]).clone()
        skip = None if D is None else D.to(part.D.dtype)
        outputs = [
            step(
                state,
                hidden[..., column],
                dt[..., column],
                A,
                B[..., column],
                C[..., column],
                skip,
                z=None if z is None else z[..., column],
                dt_bias=delta_bias,
                dt_softplus=delta_softplus,
            )
            for column in range(hidden.shape[-1])
        ]
        return torch.stack(outputs, dim=-1), state

    return None if whole is None else scan


def _unclamped(beside: Mapping[str, Any], *_: Any) -> Any:
    """Mamba 2's scan without limits of the time step, which the step of plain generation has not."""
    scan = beside["mamba2_chunk_scan"]

    def free(*args: Any, dt_limit: Any = None, **kwargs: Any) -> Any:
        return scan(*args, dt_limit=NO_LIMIT, **kwargs)

    return free


_SCANS: dict[str, Callable[..., Any]] = {"mamba_selective_scan": _selective, "mamba2_chunk_scan": _unclamped}
"""Functions that some files have for a scan, and what goes on from a state in their place."""
