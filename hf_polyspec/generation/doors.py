# SPDX-License-Identifier: Apache-2.0
"""The doors: every way of getting `assistant_models` into `model.generate(...)`.

All of them end in `decode`, transformers' public `custom_generate` contract. What that contract loses on the way -
a streamer, stop strings with their tokenizer - is bound here.
"""

from __future__ import annotations

import copy
import functools
import inspect
import types
from collections.abc import Callable
from typing import Any

from transformers import GenerationConfig, GenerationMixin, StoppingCriteriaList
from transformers.generation.stopping_criteria import StopStringCriteria

from ..host.compatibility import check_cache_implementation, inner_model
from .decoding import SYNCED_GPUS, decode
from .options import PolySpecOptions
from .plan import resolve_plan

_MARK = "_polyspec_wraps"
_POSITIONAL = (
    "inputs",
    "generation_config",
    "logits_processor",
    "stopping_criteria",
    "prefix_allowed_tokens_fn",
    "synced_gpus",
    "assistant_model",
    "streamer",
)


def generate(model: Any, *args: Any, assistant_models: Any = None, **kwargs: Any) -> Any:
    """`model.generate(...)` with `assistant_models=[...]`, for a model that has neither been attached nor enabled."""
    if assistant_models is None:
        return model.generate(*args, **kwargs)
    return _generate(inner_model(model), model.generate, args, assistant_models, kwargs)


def enable() -> None:
    """Let every transformers model take `assistant_models=[...]` in `generate()`. Calling it twice changes nothing."""
    if not hasattr(GenerationMixin.generate, _MARK):
        GenerationMixin.generate = _wrap(GenerationMixin.generate)


def disable() -> None:
    """Undo `enable()`."""
    original = getattr(GenerationMixin.generate, _MARK, None)
    if original is not None:
        GenerationMixin.generate = original


def attach(model: Any) -> Any:
    """Let one model take `assistant_models=[...]`; returns the model. For a PEFT model, its base model is changed."""
    base = inner_model(model)
    # enable() may be undone later, so what it did to the class does not count.
    if not hasattr(vars(base).get("generate"), _MARK):
        base.generate = types.MethodType(_wrap(_unbound(base)), base)
    return model


def detach(model: Any) -> Any:
    """Undo `attach(model)`; returns the model."""
    base = inner_model(model)
    own = vars(base).get("generate")
    wrapped = getattr(own, _MARK, None)
    if wrapped is not None:
        previous = getattr(wrapped, "_polyspec_instance_attribute", None)
        if previous is None:
            del base.generate
        else:
            base.generate = previous
    return model


class PolySpecGenerationMixin:
    """Gives a model class `assistant_models`: `class MyModel(PolySpecGenerationMixin, LlamaForCausalLM)`."""

    def generate(self, *args: Any, assistant_models: Any = None, **kwargs: Any) -> Any:
        """`GenerationMixin.generate` with `assistant_models=[...]`."""
        original: Callable[..., Any] = getattr(super(), "generate")  # noqa: B009 - a mixin's super is known at run time
        if assistant_models is None:
            return original(*args, **kwargs)
        return _generate(self, original, args, assistant_models, kwargs)


def _unbound(model: Any) -> Callable[..., Any]:
    """The model's present generate as a function of the model; an instance attribute (Hub recipes set one) is kept."""
    own = vars(model).get("generate")
    if own is None:
        plain: Callable[..., Any] = type(model).generate
        return plain

    @functools.wraps(own)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        return own(*args, **kwargs)

    call._polyspec_instance_attribute = own  # type: ignore[attr-defined]
    return call


def _wrap(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def generate(self: Any, *args: Any, assistant_models: Any = None, **kwargs: Any) -> Any:
        if assistant_models is None:
            return original(self, *args, **kwargs)
        return _generate(self, functools.partial(original, self), args, assistant_models, kwargs)

    signature = inspect.signature(original)
    if "assistant_models" not in signature.parameters:
        extra = inspect.Parameter("assistant_models", inspect.Parameter.KEYWORD_ONLY, default=None)
        parameters = list(signature.parameters.values())
        place = len(parameters) - (parameters[-1].kind is inspect.Parameter.VAR_KEYWORD)
        signature = signature.replace(parameters=[*parameters[:place], extra, *parameters[place:]])
    generate.__signature__ = signature  # type: ignore[attr-defined]
    setattr(generate, _MARK, original)
    return generate


def _generate(
    model: Any, original: Callable[..., Any], args: tuple[Any, ...], assistant_models: Any, kwargs: dict[str, Any]
) -> Any:
    """Call `original` so that it ends in `decode` with everything the caller said."""
    given = dict(zip(_positional_names(), args, strict=False)) | kwargs
    _refuse_early(model, given)
    bound: dict[str, Any] = {"assistant_models": assistant_models, "streamer": given.get("streamer")}
    given.pop("custom_generate", None)
    if given.get("polyspec_plan") is not None:
        chosen, sizes = resolve_plan(given.pop("polyspec_plan"), model, assistant_models, given)
        if not chosen:
            return original(**{name: value for name, value in given.items() if name not in PolySpecOptions.names()})
        given, bound = given | sizes, bound | {"assistant_models": chosen}
    given = _with_stop_strings(model, given)
    return original(**given, custom_generate=functools.partial(decode, **bound))


def _positional_names() -> list[str]:
    """Names of generate()'s positional arguments; somebody else's patch may hide them behind `*args`."""
    parameters = inspect.signature(GenerationMixin.generate).parameters.values()
    names = [p.name for p in parameters if p.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD and p.name != "self"]
    return names or list(_POSITIONAL)


def _refuse_early(model: Any, given: dict[str, Any]) -> None:
    """What transformers would otherwise act on before `decode` is asked."""
    if given.get("assistant_model") is not None:
        raise ValueError("both assistant_model and assistant_models were given; put all of them into assistant_models.")
    if given.get("custom_generate") is not None:
        raise ValueError("custom_generate and assistant_models each replace the decoding loop; give one of them.")
    if given.get("synced_gpus"):
        raise ValueError(SYNCED_GPUS)
    config = inner_model(model).config
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(
            f"the target ({type(model).__name__}) is an encoder-decoder model; "
            "assistant_models work with decoder-only models."
        )
    generation_config = given.get("generation_config")
    check_cache_implementation(given.get("cache_implementation"))
    check_cache_implementation(getattr(generation_config, "cache_implementation", None))


def _with_stop_strings(model: Any, given: dict[str, Any]) -> dict[str, Any]:
    """Turn stop strings into a criterion here: transformers loses the tokenizer on the way to a callable."""
    configs = [given.get("generation_config"), getattr(model, "generation_config", None)]
    set_there = [getattr(config, "stop_strings", None) for config in configs]
    configured = next((strings for strings in set_there if strings is not None), None)
    strings = given.get("stop_strings") if given.get("stop_strings") is not None else configured
    if strings is None:
        return given
    tokenizer = given.get("tokenizer")
    if tokenizer is None:
        raise ValueError("stop_strings need the tokenizer: pass tokenizer=... to generate() too.")
    # transformers puts its own criteria first; the order among criteria changes nothing.
    criteria = StoppingCriteriaList(given.get("stopping_criteria") or [])
    criteria.append(StopStringCriteria(stop_strings=strings, tokenizer=tokenizer))
    rest = {name: value for name, value in given.items() if name != "stop_strings"}
    if configured is not None:
        rest["generation_config"] = _WithoutStopStrings.like(configs[0])
    return rest | {"stopping_criteria": criteria}


class _WithoutStopStrings(GenerationConfig):
    """A generation config that cannot be given stop strings: the model's own would otherwise be merged back in."""

    @classmethod
    def like(cls, config: GenerationConfig | None) -> _WithoutStopStrings:
        """A copy of `config` in everything else."""
        found = cls()
        if config is not None:
            found.__dict__.update({k: copy.deepcopy(v) for k, v in vars(config).items() if k != "stop_strings"})
        return found

    @property
    def stop_strings(self) -> None:
        return None

    @stop_strings.setter
    def stop_strings(self, value: Any) -> None:
        """Ignored: the criterion is already there."""
