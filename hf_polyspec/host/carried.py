# SPDX-License-Identifier: Apache-2.0
"""Where a model keeps a state besides the layers of transformers' cache: found by looking at one pass.

RWKV and xLSTM return it and take it back in an argument, RecurrentGemma leaves it in its modules, and MiniMax has it in
a cache of its own class.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch
from transformers.cache_utils import Cache, DynamicCache

from ..errors import TARGET, UncheckableError
from .named_code import state_writers
from .release import GENERATION_CACHE, forward_arguments, inner_model, input_device

_TEXT = [1, 2, 1]


@dataclass(frozen=True)
class Carried:
    """What a model carries on.

    Attributes:
        argument: of its forward, which its output returns; it stands for the cache.
        cache_class: of the cache that it makes for itself; attributes: which of those it has on top of others hold it.
        places: modules, and attributes of theirs that a pass writes.
    """

    argument: str | None = None
    cache_class: type[Any] | None = None
    attributes: tuple[str, ...] = ()
    places: list[tuple[Any, str]] = field(default_factory=list)

    @property
    def any(self) -> bool:
        """Whether there is anything."""
        return bool(self.argument or self.cache_class or self.places)


_known: WeakKeyDictionary[Any, Carried] = WeakKeyDictionary()


def carried_by(model: Any) -> Carried:
    """What a model carries on outside of cache layers; asked once a model, and only of those that say they do."""
    inner = inner_model(model)
    if inner is None:
        return Carried()
    if inner not in _known:
        asked = _says_so(inner) and input_device(model).type != "meta"
        _known[inner] = _found(inner) if asked else Carried()
    return _known[inner]


def check_continued(model: Any, *, filled: bool) -> None:
    """Refuse a caller's cache, filled or not, that is not the whole of what the model goes on from.

    Raises:
        UncheckableError: the rest is in a cache of the model's own class; ValueError: in modules, which hold what they
            held before a chain's call, and not what it has read. Both name the model.
    """
    carried = carried_by(model)
    if carried.cache_class is not None or (carried.places and filled):
        place = "its modules" if carried.places else "a cache of its own class"
        sentence = (
            f"{type(inner_model(model)).__name__} keeps a part of what it has read in {place}, from where a chain "
            f"cannot go on; leave {GENERATION_CACHE} out and pass the whole text."
        )
        raise ValueError(sentence) if carried.places else UncheckableError(sentence, TARGET)


def keeps_rows_apart(model: Any) -> bool:
    """Whether a row that goes on from an argument says the same beside another row as alone; true of other models."""
    inner = inner_model(model)
    name = carried_by(model).argument
    if name is None:
        return True
    if inner not in _apart:
        _apart[inner] = _says_the_same(inner, name)
    return _apart[inner]


_apart: WeakKeyDictionary[Any, bool] = WeakKeyDictionary()


@torch.no_grad()
def _says_the_same(inner: Any, name: str) -> bool:
    rows, found = [_TEXT, [2, 1, 1]], []
    for count in (1, 2):
        ids = torch.tensor(rows[:count], device=input_device(inner))
        state: dict[str, Any] = {}
        for piece in (ids[:, :2], ids[:, 2:]):
            output = inner(input_ids=piece, use_cache=True, return_dict=True, **state)
            state = {name: output[name]}
        found.append(output.logits[0, -1].float())
    return bool(torch.allclose(found[0], found[1], rtol=1e-2, atol=1e-2 * float(found[0].abs().max())))


def _says_so(inner: Any) -> bool:
    """Whether a class says that it keeps a state, or wants no cache of transformers, and writes no state into one."""
    usual = getattr(inner, "_supports_default_dynamic_cache", lambda: True)
    return (bool(getattr(inner, "_is_stateful", False)) or not usual()) and not state_writers(inner)


@torch.no_grad()
def _found(inner: Any) -> Carried:
    before = {(part, name): value for part in inner.modules() for name, value in _plain(part).items()}
    ids = torch.tensor([_TEXT], device=input_device(inner))
    try:
        output = inner(input_ids=ids, use_cache=True, return_dict=True)
    except Exception:
        return Carried()
    finally:
        places = [
            (part, name)
            for part in inner.modules()
            for name, value in _plain(part).items()
            if isinstance(value, torch.Tensor) and before.get((part, name), value) is not value
        ]
        for part, name in places:
            setattr(part, name, before[part, name])
    taken = forward_arguments(inner)
    named = {name: value for name, value in output.items() if name in taken and value is not None}
    for name, value in named.items():
        if isinstance(value, Cache):
            kind, more = type(value), tuple(vars(value).keys() - vars(DynamicCache()).keys())
            if kind is not DynamicCache and issubclass(kind, DynamicCache) and more and _is_simple(kind):
                return Carried(cache_class=kind, attributes=more, places=places)
        elif name != "input_ids" and any(one.dim() > 1 and one.is_floating_point() for one in tensors_in(value)):
            return Carried(argument=name, places=places)
    return Carried(places=places)


def _plain(part: Any) -> dict[str, Any]:
    """A module's attributes that are tensors or nothing, without parameters and buffers."""
    return {name: value for name, value in vars(part).items() if value is None or isinstance(value, torch.Tensor)}


def _is_simple(kind: type[Any]) -> bool:
    try:
        kind()
    except Exception:
        return False
    return True


def tensors_in(value: Any) -> list[torch.Tensor]:
    """All tensors of a value that holds some, however deep."""
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, dict):
        return [one for inner in value.values() for one in tensors_in(inner)]
    if isinstance(value, (list, tuple)):
        return [one for inner in value for one in tensors_in(inner)]
    return tensors_in(vars(value)) if is_holder(value) else []


def is_holder(value: Any) -> bool:
    """Whether a value is an object of a class of transformers' models that holds tensors, such as xLSTM's cache."""
    return (
        type(value).__module__.startswith("transformers.models") and hasattr(value, "__dict__") and not _is_more(value)
    )


def _is_more(value: Any) -> bool:
    return isinstance(value, torch.nn.Module) or hasattr(value, "model_type")


@contextmanager
def standing(places: list[tuple[Any, str]], values: list[Any]) -> Iterator[None]:
    """While this runs, these values stand in modules; what a pass leaves there is put into `values`."""
    before = [getattr(part, name) for part, name in places]
    try:
        for (part, name), value in zip(places, values, strict=True):
            setattr(part, name, value)
        yield
        values[:] = [getattr(part, name) for part, name in places]
    finally:
        for (part, name), value in zip(places, before, strict=True):
            setattr(part, name, value)
