# SPDX-License-Identifier: Apache-2.0
"""Standing in for generate(): of every model, or of one, and giving the place back.

Others patch generate() too (tracing, metrics), before us and after us. So a patch is told apart by identity, never by
an attribute that `functools.wraps` copies, and one that is buried under somebody else's is not torn out but turned
off: it then passes everything on as it is.
"""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable
from typing import Any, Protocol
from weakref import WeakKeyDictionary, WeakSet, ref

from transformers import GenerationMixin

from .release import inner_model, parameters_of

POSITIONAL = (
    "inputs",
    "generation_config",
    "logits_processor",
    "stopping_criteria",
    "prefix_allowed_tokens_fn",
    "synced_gpus",
    "assistant_model",
    "streamer",
)
"""generate()'s positional arguments, should somebody's patch hide them behind `*args`."""


class Door(Protocol):
    """What takes generate()'s place: told the model, the generate below, and what the caller said."""

    def __call__(self, model: Any, below: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any: ...


class Patch:
    """One stand-in for a generate().

    Args:
        original: the generate() that was there, as a function of the model.
        door: what is called while the patch is on.
        extra: keyword arguments that the door takes beyond the original's.
        before: the instance attribute in whose place it stands, None for the class's own generate().
    """

    def __init__(self, original: Callable[..., Any], door: Door, extra: tuple[str, ...], before: Any = None) -> None:
        self.original = original
        self.before = before
        self.on = True
        self.off_for: WeakSet[Any] = WeakSet()

        @functools.wraps(original)
        def generate(model: Any, *args: Any, **kwargs: Any) -> Any:
            if not self.on or (self.off_for and model in self.off_for):
                return original(model, *args, **kwargs)
            return door(model, functools.partial(original, model), args, kwargs)

        _show(generate, original, extra)
        self.function = generate
        _made[generate] = ref(self)


def _show(function: Any, original: Callable[..., Any], extra: tuple[str, ...]) -> None:
    """Let help() and completion see the original's signature with the extra arguments in it."""
    signature = inspect.signature(original)
    parameters = list(signature.parameters.values())
    place = len(parameters) - bool(parameters and parameters[-1].kind is inspect.Parameter.VAR_KEYWORD)
    more = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None)
        for name in extra
        if name not in signature.parameters
    ]
    function.__signature__ = signature.replace(parameters=[*parameters[:place], *more, *parameters[place:]])


_everywhere: Patch | None = None
# A patch lives as long as its function, and may hold on to a model whose own generate() it stands in for.
_attached: WeakKeyDictionary[Any, ref[Patch]] = WeakKeyDictionary()
_made: WeakKeyDictionary[Callable[..., Any], ref[Patch]] = WeakKeyDictionary()
"""Every patch by its function: a copy of a model carries the function on, and nothing else tells."""


def patch_all(door: Door, extra: tuple[str, ...]) -> None:
    """Stand in for every model's generate(); twice changes nothing."""
    global _everywhere
    if _everywhere is not None:
        if _everywhere.on and GenerationMixin.generate is _everywhere.function:
            return
        _everywhere.on = False  # buried, or put aside with somebody's patch
    _everywhere = Patch(GenerationMixin.generate, door, extra)
    GenerationMixin.generate = _everywhere.function


def unpatch_all() -> None:
    """Undo `patch_all`; patches that others made since stay, and ours under them passes everything on."""
    global _everywhere
    patch, _everywhere = _everywhere, None
    if patch is None:
        return
    patch.on = False
    if GenerationMixin.generate is patch.function:
        GenerationMixin.generate = patch.original


def patch_one(model: Any, door: Door, extra: tuple[str, ...]) -> None:
    """Stand in for one model's generate(), for a wrapped one that of the model inside; twice changes nothing."""
    base = inner_model(model)
    own = vars(base).get("generate")
    patch = _alive(_attached.get(base)) or _carried_on(own)
    if patch is not None and _stands(patch, own):
        return
    patch = Patch(_unbound(base, own), door, extra, own)
    _attached[base] = ref(patch)
    base.generate = types.MethodType(patch.function, base)


def unpatch_one(model: Any) -> None:
    """Undo `patch_one`; an instance attribute that was there before is there again."""
    base = inner_model(model)
    own = vars(base).get("generate")
    patch = _alive(_attached.pop(base, None)) or _carried_on(own)
    if patch is None:
        return
    if not _stands(patch, own):
        patch.off_for.add(base)  # under somebody else's
    elif patch.before is None:
        del base.generate
    elif isinstance(patch.before, types.MethodType) and isinstance(patch.before.__self__, type(base)):
        same = patch.before.__self__ is base
        base.generate = patch.before if same else types.MethodType(patch.before.__func__, base)
    else:
        base.generate = patch.before


def _carried_on(own: Any) -> Patch | None:
    """The patch of the model that this one was copied from, which the copy goes on with."""
    function = getattr(own, "__func__", None)
    return None if function is None else _alive(_made.get(function))


def _alive(patch: ref[Patch] | None) -> Patch | None:
    return None if patch is None else patch()


def _stands(patch: Patch, own: Any) -> bool:
    return getattr(own, "__func__", None) is patch.function


def _unbound(model: Any, own: Callable[..., Any] | None) -> Callable[..., Any]:
    """The model's present generate as a function of the model; an instance attribute (Hub recipes set one) is kept."""
    if own is None:
        plain: Callable[..., Any] = type(model).generate
        # enable() may be undone later, so what it did to the class does not count.
        return _everywhere.original if _everywhere is not None and plain is _everywhere.function else plain

    @functools.wraps(own)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        return own(*args, **kwargs)

    return call


def positional_names() -> list[str]:
    """Names of generate()'s positional arguments."""
    parameters = parameters_of(GenerationMixin.generate).values()
    names = [p.name for p in parameters if p.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD and p.name != "self"]
    return names or list(POSITIONAL)
