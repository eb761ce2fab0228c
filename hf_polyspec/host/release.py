# SPDX-License-Identifier: Apache-2.0
"""What this release of transformers calls things, found by looking at its signatures and fields.

Releases rename arguments (5.24 made `past_key_values` and `cache_params` into `cache`). What something is called is
asked here once and used everywhere else, so that a new name is one more entry of a tuple, or none: an argument whose
annotation says that it is a cache is recognised under any name.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import fields
from operator import attrgetter, is_
from types import FunctionType
from typing import Any
from weakref import WeakKeyDictionary

import torch
import transformers
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation.utils import GenerateDecoderOnlyOutput

from .walking import modules_of, once_of

NEWEST_TESTED = "5.24"
"""The newest minor release that this package's whole test suite ran on; pyproject.toml's upper bound is the next."""

CACHE_NAMES = ("cache", "past_key_values", "cache_params")
"""Names that releases gave the key-value cache, the newest first."""


def installed() -> str:
    """The installed release."""
    return str(transformers.__version__)


def is_newer_than_tested() -> bool:
    """Whether the installed release is of a later minor than `NEWEST_TESTED`.

    The one place where version numbers are compared: whether somebody ran the tests on a release shows nowhere in it.
    """
    return _minor(installed()) > _minor(NEWEST_TESTED)


def _minor(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".")[:2] if part.isdigit())


def inner_model(model: Any) -> Any:
    """The transformers model inside wrappers of PEFT and torch.compile, or the model itself."""
    while True:
        if _has(model, "get_base_model"):
            model = model.get_base_model()
        elif "_orig_mod" in getattr(model, "_modules", {}):
            model = model._orig_mod
        else:
            return model


_ASKED_LAST = torch.nn.Module.__getattr__


def _has(model: Any, name: str) -> bool:
    """Whether there is a method; without the error that `nn.Module.__getattr__` ends in, where it has no other word."""
    kind = type(model)
    if getattr(kind, "__getattr__", None) is not _ASKED_LAST:
        return hasattr(model, name)
    return hasattr(kind, name) or name in model.__dict__ or name in model._modules


def is_compiled(model: Any) -> bool:
    """Whether torch.compile has been at a model or at a part of it: from outside, in place, or at its forward.

    What it made guards the modules it has seen, and fails where their forward is replaced for a while.
    """
    return once_of(model, "compiled", _is_compiled)


def _is_compiled(model: Any) -> bool:
    for module in modules_of(model):
        own = module.__dict__  # without the detour through `nn.Module.__getattr__`
        if "_orig_mod" in module._modules or own.get("_compiled_call_impl") is not None:
            return True
        if "forward" in own and _compiled_forward(module):
            return True
    return False


def plain_name(name: str) -> str:
    """A module's name in a model of which no part is wrapped by torch.compile."""
    return name.replace("_orig_mod.", "")


def without_compiled_forwards(copy: Any) -> Any:
    """A copied model whose modules compute with their own forward: a compiled one is still bound to the original."""
    while "_orig_mod" in copy._modules:
        copy = copy._orig_mod
    for module in list(copy.modules()):
        for name, child in module._modules.items():
            if child is not None and "_orig_mod" in child._modules:
                module._modules[name] = child._modules["_orig_mod"]
        if _compiled_forward(module) and "_orig_mod" not in module._modules:
            del module.forward
    return copy


def _compiled_forward(module: Any) -> bool:
    return hasattr(vars(module).get("forward"), "_torchdynamo_orig_callable")


def input_device(model: Any) -> torch.device:
    """Where the model wants its ids: the device of its input embedding (a sharded model has several)."""
    embedding = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
    for module in (embedding, model):
        if module is not None:
            for tensor in module.parameters():
                if tensor.device.type != "meta":
                    return torch.device(tensor.device)
    return torch.device("cpu")


def parameters_of(function: Any) -> Mapping[str, inspect.Parameter]:
    """A function's parameters by name; none where it does not tell."""
    plain = getattr(function, "__func__", function)
    if type(plain) is not FunctionType:
        return _asked(function)
    known, bound, said = _parameters.setdefault(plain, {}), plain is not function, _said(plain)
    found = known.get(bound)
    if found is None or len(found[0]) != len(said) or not all(map(is_, found[0], said)):
        found = known[bound] = said, _asked(function)
    return found[1]


_parameters: WeakKeyDictionary[Any, dict[bool, tuple[list[Any], Mapping[str, inspect.Parameter]]]] = WeakKeyDictionary()
"""By function, and whether it is bound to an object: what its signature is made of, and its parameters."""
_SAID = attrgetter("__code__", "__defaults__", "__kwdefaults__")


def _said(function: Any) -> list[Any]:
    """What the signature of a function, and of what it wraps, is made of."""
    found: list[Any] = []
    while type(function) is FunctionType:
        further = function.__dict__
        found += (*_SAID(function), further.get("__signature__"), further.get("__wrapped__"))
        function = further.get("__wrapped__")
    return found


def _asked(function: Any) -> Mapping[str, inspect.Parameter]:
    try:
        return inspect.signature(function).parameters
    except (TypeError, ValueError):
        return {}


def forward_parameters(model: Any) -> dict[str, inspect.Parameter]:
    """Named parameters of a model's forward.

    A forward that hides behind `*args, **kwargs`, as wrappers write it, is asked what the class below it takes.
    """
    inner = inner_model(model)
    kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    found: dict[str, inspect.Parameter] = {}
    for function in (inner.forward, *(vars(kind).get("forward") for kind in type(inner).__mro__)):
        if function is None:
            continue
        given = parameters_of(function)
        for name, parameter in given.items():
            if parameter.kind not in kinds and name != "self":
                found.setdefault(name, parameter)
        named = [p for p in given.values() if p.kind not in kinds and p.name != "self"]
        if named or inspect.Parameter.VAR_KEYWORD not in {p.kind for p in given.values()}:
            break
    return found


def forward_arguments(model: Any) -> set[str]:
    """Names that the model's forward takes; a wrapper's are those of the model inside."""
    return set(forward_parameters(model))


def named_cache(parameters: Mapping[str, Any]) -> str | None:
    """Which of some parameters (or annotations) is the cache: by a name that releases used, or by its annotation."""
    for name in CACHE_NAMES:
        if name in parameters:
            return name
    for name, parameter in parameters.items():
        annotation = getattr(parameter, "annotation", parameter)
        if "Cache" in str(annotation):
            return name
    return None


_arguments: WeakKeyDictionary[Any, str | None] = WeakKeyDictionary()


def cache_argument(model: Any) -> str | None:
    """By which name a model's forward takes its key-value cache; None where it takes none.

    The signature tells. Where it names nothing of the kind, names that its code mentions are tried on one token: a
    deprecated name may be taken without being shown.
    """
    inner = inner_model(model)
    if inner not in _arguments:
        _arguments[inner] = named_cache(forward_parameters(inner)) or _accepted(inner)
    return _arguments[inner]


@torch.no_grad()
def _accepted(model: Any) -> str | None:
    """The first known name that the code of the model's forward mentions and under which it fills a cache.

    One that hands its further arguments on may take it without a word, where the model inside has such an argument.
    """
    said = _strings(type(model).forward) | {named_cache(parameters_of(part.forward)) for part in model.children()}
    mentioned = [name for name in CACHE_NAMES if name in said]
    embedding = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
    weight = getattr(embedding, "weight", None)
    if not mentioned or weight is None or weight.device.type == "meta":
        return None
    ids = torch.zeros(1, 1, dtype=torch.long, device=weight.device)
    for name in mentioned:
        cache = DynamicCache()
        try:
            model(input_ids=ids, use_cache=True, **{name: cache})
        except Exception:
            continue
        if int(cache.get_seq_length()) == 1:
            return name
    return None


def _strings(function: Any) -> set[str]:
    """Words that a function, what it wraps and what it closes over are written with."""
    found: set[str] = set()
    while function is not None:
        code = getattr(function, "__code__", None)
        cells = [cell.cell_contents for cell in getattr(function, "__closure__", None) or () if _is_filled(cell)]
        found.update(word for word in (*(code.co_consts if code else ()), *cells) if isinstance(word, str))
        function = getattr(function, "__wrapped__", None)
    return found


def _is_filled(cell: Any) -> bool:
    try:
        cell.cell_contents  # noqa: B018 - reading is the test
    except ValueError:
        return False
    return True


def with_cache(model: Any, cache: Any) -> dict[str, Any]:
    """The cache as an argument of the model's forward, by the name it has there.

    Raises:
        ValueError: the forward has no such argument.
    """
    name = cache_argument(model)
    if name is None:
        raise ValueError(no_cache_argument(type(inner_model(model)).__name__, model))
    return {name: cache}


def no_cache_argument(role: str, model: Any) -> str:
    """The sentence for a model whose forward has no cache under a known name."""
    known = " or ".join(repr(name) for name in CACHE_NAMES[:2])
    takes = ", ".join(sorted(forward_arguments(model))[:12]) or "only *args and **kwargs"
    return (
        f"the forward() of {role} has no argument {known} (it takes {takes}), and a chain hands every level its "
        "key-value cache by that name; let the class take it so, or leave the model out."
    )


def cache_of(values: Mapping[str, Any]) -> Any:
    """The cache among generate()'s `model_kwargs` or a model's output, None where there is none.

    Taken by its name, or under any other name if it is one of transformers' caches.
    """
    for name in CACHE_NAMES:
        if name in values:
            return values[name]
    return next((value for value in values.values() if isinstance(value, Cache)), None)


def cache_names(values: Mapping[str, Any]) -> set[str]:
    """All names under which `values` hold a cache."""
    return {name for name, value in values.items() if name in CACHE_NAMES or isinstance(value, Cache)}


GENERATION_CACHE = (
    named_cache({field.name: field.type for field in fields(GenerateDecoderOnlyOutput)}) or CACHE_NAMES[0]
)
"""What generate() of this release calls the cache, in its arguments and in its output."""
