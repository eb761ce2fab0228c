# SPDX-License-Identifier: Apache-2.0
"""The doors: every way of getting `assistant_models` into `model.generate(...)`.

All of them end in `decode`, transformers' public `custom_generate` contract. What that contract loses on the way -
a streamer, stop strings with their tokenizer - is bound here.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from typing import Any

from transformers import StoppingCriteriaList

from ..defaults import require_model
from ..errors import TARGET, UncheckableError, refusals
from ..host.compatibility import check_cache_implementation, other_strategy
from ..host.contract import check_release
from ..host.generation import StopStringCriteria, without
from ..host.patching import patch_all, patch_one, positional_names, unpatch_all, unpatch_one
from ..host.peculiar import check_generate
from ..host.pictures import shown
from ..host.release import inner_model
from .alone import ALONE
from .decoding import decode
from .members import leaves_choice, members
from .options import BESIDE, PolySpecOptions
from .plan import resolve_plan

_EXTRA = ("assistant_models",)

_UNSAID: Any = object()
"""Stands for assistant_models that nobody passed: a generation config may name some. None says that there are none."""

_running: ContextVar[frozenset[int]] = ContextVar("polyspec_running", default=frozenset())
"""Models whose chains are running at this moment, by id: a level that asks the target for plain text shall get it."""

_inside: ContextVar[frozenset[int]] = ContextVar("polyspec_inside", default=frozenset())
"""Models whose own generate() the function `generate` is calling at this moment, by id."""


def generate(model: Any, *args: Any, assistant_models: Any = _UNSAID, **kwargs: Any) -> Any:
    """`model.generate(...)` with `assistant_models=[...]`, for a model that has neither been attached nor enabled.

    A model whose folder brings a `custom_generate` has a generate() that may lead here again; the second time its
    class's generate() is meant.
    """
    if id(model) in _inside.get():
        below = functools.partial(type(model).generate, model)
        return _through(model, below, args, assistant_models, kwargs)
    with _noted(_inside, model):
        return _through(model, model.generate, args, assistant_models, kwargs)


@contextmanager
def _noted(where: ContextVar[frozenset[int]], model: Any) -> Iterator[None]:
    """The model stands in one of the sets above for a while."""
    token = where.set(where.get() | {id(model)})
    try:
        yield
    finally:
        where.reset(token)


def enable() -> None:
    """Let every transformers model take `assistant_models=[...]` in `generate()`. Calling it twice changes nothing.

    Raises:
        ReleaseError: the installed transformers is newer than any tested one, and changed what a chain relies on.
    """
    check_release()
    patch_all(_door, _EXTRA)


def disable() -> None:
    """Undo `enable()`; what others have put in generate()'s place since then stays."""
    unpatch_all()


def attach(model: Any) -> Any:
    """Let one model take `assistant_models=[...]`; returns the model. For a PEFT model, its base model is changed.

    Raises:
        ReleaseError: as `enable()`.
        TypeError: it is no model that generates.
    """
    require_model("attach", model)
    if not hasattr(model, "generate"):
        raise TypeError(f"attach() takes a model that has a generate(), got {type(model).__name__}.")
    check_release()
    patch_one(model, _door, _EXTRA)
    return model


def detach(model: Any) -> Any:
    """Undo `attach(model)`; returns the model."""
    require_model("detach", model)
    unpatch_one(model)
    return model


class PolySpecGenerationMixin:
    """Gives a model class `assistant_models`: `class MyModel(PolySpecGenerationMixin, LlamaForCausalLM)`."""

    def generate(self, *args: Any, assistant_models: Any = _UNSAID, **kwargs: Any) -> Any:
        """`GenerationMixin.generate` with `assistant_models=[...]`."""
        original: Callable[..., Any] = getattr(super(), "generate")  # noqa: B009 - a mixin's super is known at run time
        return _through(self, original, args, assistant_models, kwargs)


def _door(model: Any, below: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    assistant_models = kwargs.pop("assistant_models", _UNSAID)
    return _through(model, below, args, assistant_models, kwargs)


def _through(
    model: Any, below: Callable[..., Any], args: tuple[Any, ...], assistant_models: Any, kwargs: dict[str, Any]
) -> Any:
    """Call `below`, through `decode` if there are assistants."""
    if assistant_models is _UNSAID:
        assistant_models = _configured_assistants(model, args, kwargs)
    if assistant_models is None:
        return below(*args, **kwargs)
    if isinstance(kwargs.get("custom_generate"), str):
        # transformers loads a function from there and hands it everything as it is, checked by nobody.
        return below(*args, assistant_models=assistant_models, **kwargs)
    check_release()
    with _noted(_running, model):
        return _generate(inner_model(model), below, args, assistant_models, kwargs)


def _configured_assistants(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What a generation config says of assistant_models, if the call can mean it."""
    if id(model) in _running.get() or kwargs.get("custom_generate") not in (None, decode):
        return None
    return _configured(inner_model(model), _by_name(args, kwargs), "assistant_models")


def _by_name(args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    return dict(zip(positional_names(), args, strict=False)) | kwargs if args else kwargs


def _configured(model: Any, given: dict[str, Any], name: str) -> Any:
    """What stands under a name in the generation config that was passed, or else in the model's own."""
    configs = (given.get("generation_config"), getattr(model, "generation_config", None))
    values = (getattr(config, name, None) for config in configs)
    return next((value for value in values if value is not None), None)


def _generate(
    model: Any, original: Callable[..., Any], args: tuple[Any, ...], assistant_models: Any, kwargs: dict[str, Any]
) -> Any:
    """Call `original` so that it ends in `decode` with everything the caller said."""
    given = _by_name(args, kwargs)
    try:
        _refuse_early(model, given)
        _leave_alone(model, given, assistant_models)
    except UncheckableError as reason:
        return _without(reason, model, original, given)
    bound: dict[str, Any] = {"assistant_models": assistant_models, "streamer": given.get("streamer")}
    bound["synced_gpus"] = bool(given.get("synced_gpus"))
    # transformers loses both on the way to a callable, and refuses the second one without an assistant of its own.
    bound |= {name: given[name] for name in ("tokenizer", "assistant_tokenizer") if given.get(name) is not None}
    given = {name: value for name, value in given.items() if name not in ("custom_generate", "assistant_tokenizer")}
    # transformers encodes pictures for the target, and drops them before a callable is asked.
    if seen := shown(model, given):
        bound["inputs_shown"] = seen
    plan = given.pop("polyspec_plan", None)
    plan = _configured(model, given, "polyspec_plan") if plan is None else plan
    if plan is not None and not leaves_choice(assistant_models, plan):
        chosen, sizes = resolve_plan(plan, model, members(model, assistant_models), given)
        if not chosen and not _has_own_seed(model, given):
            return original(**{name: value for name, value in given.items() if name not in PolySpecOptions.names()})
        given, bound = given | sizes, bound | {"assistant_models": chosen}
    given = _with_stop_strings(model, given)
    return original(**_without_configured(model, given), custom_generate=functools.partial(decode, **bound))


def _without(reason: UncheckableError, model: Any, original: Callable[..., Any], given: dict[str, Any]) -> Any:
    """What a class with a generate() of its own makes, and a warning that says why nobody assisted it."""
    if _has_own_seed(model, given):
        with refusals():
            raise reason
    warnings.warn(f"{reason} {ALONE}", stacklevel=5)
    ours = {*PolySpecOptions.names(), "assistant_tokenizer", "polyspec_plan"}
    return original(**_without_configured(model, {name: value for name, value in given.items() if name not in ours}))


def _without_configured(model: Any, given: dict[str, Any]) -> dict[str, Any]:
    """The call without what has been read from a generation config: transformers would copy it, weights and all."""
    read = [name for name in (*BESIDE, "stop_strings") if _configured(model, given, name) is not None]
    return given | {"generation_config": without(given.get("generation_config"), read)} if read else given


def _has_own_seed(model: Any, given: dict[str, Any]) -> bool:
    """Whether the call brings a seed, which plain generation does not know."""
    said = (given, vars(given.get("generation_config") or model.generation_config))
    return any(where.get("polyspec_seed") is not None for where in said)


def _refuse_early(model: Any, given: dict[str, Any]) -> None:
    """What transformers would otherwise act on before `decode` is asked."""
    check_generate(model)
    if given.get("assistant_model") is not None:
        raise ValueError("both assistant_model and assistant_models were given; put all of them into assistant_models.")
    if given.get("custom_generate") not in (None, decode):
        raise ValueError("custom_generate and assistant_models each replace the decoding loop; give one of them.")
    generation_config = given.get("generation_config")
    for where in (given.get("cache_implementation"), getattr(generation_config, "cache_implementation", None)):
        with suppress(UncheckableError):  # which `decode` knows what to do with
            check_cache_implementation(where)


def _leave_alone(model: Any, given: dict[str, Any], assistant_models: Any) -> None:
    """Strategies that no chain serves, where nobody asked for both: the model's own default, or "auto", which may be
    stored in a config too.

    Raises:
        UncheckableError: names the option.
    """
    called = (given, getattr(given.get("generation_config"), "__dict__", {}))
    asked = other_strategy(*called, getattr(model.generation_config, "__dict__", {}))
    if asked is None:
        return
    if leaves_choice(assistant_models, None) or all(where.get(asked[0]) is None for where in called):
        raise UncheckableError(f"{asked[1]}.", TARGET)


def _with_stop_strings(model: Any, given: dict[str, Any]) -> dict[str, Any]:
    """Turn stop strings into a criterion here: transformers loses the tokenizer on the way to a callable."""
    strings = given.get("stop_strings")
    strings = _configured(model, given, "stop_strings") if strings is None else strings
    if strings is None:
        return given
    tokenizer = given.get("tokenizer")
    if tokenizer is None:
        raise ValueError("stop_strings need the tokenizer: pass tokenizer=... to generate() too.")
    # transformers puts its own criteria first; the order among criteria changes nothing.
    criteria = StoppingCriteriaList(given.get("stopping_criteria") or [])
    criteria.append(StopStringCriteria(stop_strings=strings, tokenizer=tokenizer))
    rest = {name: value for name, value in given.items() if name != "stop_strings"}
    return rest | {"stopping_criteria": criteria}
