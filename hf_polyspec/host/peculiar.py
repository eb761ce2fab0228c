# SPDX-License-Identifier: Apache-2.0
"""Models whose generate(), masks or inner parts are not what their class lets expect: found by looking."""

from __future__ import annotations

import functools
import sys
from typing import Any

import torch
from transformers import GenerationMixin, PreTrainedModel

from ..errors import TARGET, UncheckableError
from .named_code import names_in
from .ranks import ranks_of
from .release import inner_model
from .states import layer_plan

_WINDOW_MASKS = frozenset(
    {"create_sliding_window_causal_mask", "create_chunked_causal_mask", "create_masks_for_generate"}
)
"""transformers' functions that put a window into a mask."""


def check_generate(model: Any) -> None:
    """Refuse a model whose generate() is not transformers' own.

    Raises:
        UncheckableError: names the class; ValueError: says that its weights are spread over processes.
    """
    inner = inner_model(model)
    if not isinstance(inner, torch.nn.Module) or not hasattr(inner, "generate"):
        return
    if not isinstance(inner, GenerationMixin) or not _hands_on(type(inner)):
        ranks_of(model)  # FSDP's wrapper has it from the model inside, and is refused for what it does
        raise UncheckableError(
            f"generate() of {type(inner).__name__} is the class's own and makes text in another way than token by "
            "token, which assistant_models cannot speed up; leave them out.",
            TARGET,
        )


def _hands_on(kind: type) -> bool:
    """Whether a class generates as transformers does: by its method, or by one of its own that ends in another, be it
    through further methods of the class (Whisper's does)."""
    own: Any = getattr(kind, "generate")  # noqa: B009 - a mixin's is known at run time
    if own is GenerationMixin.generate:
        return True
    methods, left = _methods(kind), [own]
    while left:
        named = set(names_in(left.pop()))
        if "generate" in named:
            return True
        left += [getattr(kind, name) for name in named & methods]
        methods -= named
    return False


def _methods(kind: type) -> set[str]:
    """Names of what a class defines beyond transformers' usual classes."""
    usual = set(dir(GenerationMixin)) | set(dir(PreTrainedModel))
    return set(dir(kind)) - usual


def looks_back_only(model: Any) -> bool:
    """Whether some attention of the model says of itself that a token sees only what comes before it."""
    return any(getattr(part, "is_causal", False) is True for part in inner_model(model).modules())


def check_window(model: Any, length: int | None) -> None:
    """Refuse a target whose window is nothing but the end of its cache, for texts that are longer.

    Plain generation drops columns then, and a pass of several tokens would have to see others for each of them.

    Args:
        model: the target; length: tokens of the longest text to come, None for any.

    Raises:
        UncheckableError: names the class and the window.
    """
    sizes = [int(layer.sliding_window) for layer in layer_plan(model) if getattr(layer, "sliding_window", None)]
    if not sizes or _masks_windows(inner_model(model)) or (length is not None and length <= min(sizes)):
        return
    raise UncheckableError(
        f"{TARGET} ({type(inner_model(model)).__name__}) has no mask for its window of {min(sizes)} tokens and "
        "leaves it to its cache to drop what is older, which is not the same for all tokens of a draft; "
        f"assistant_models serve it up to max_length={min(sizes)}.",
        TARGET,
    )


def _masks_windows(inner: Any) -> bool:
    """Whether the code of some part of the model makes such masks; code of other packages is believed."""
    kinds = {kind for part in inner.modules() for kind in type(part).__mro__}
    known = [kind for kind in kinds if kind.__module__.startswith("transformers.models")]
    return not known or any(_calls(kind) for kind in known)


@functools.cache
def _calls(kind: type) -> bool:
    """Whether a method of a class, or a function of its file that one calls, names a function for such masks."""
    beside = vars(sys.modules[kind.__module__])
    names = {name for method in vars(kind).values() for name in names_in(method)}
    return any(name in _WINDOW_MASKS or not _WINDOW_MASKS.isdisjoint(names_in(beside.get(name))) for name in names)


def as_target(target: Any, assistant: Any) -> Any:
    """The part of an assistant that is of the target's class, where the assistant is a larger whole around one.

    Some classes hand generate() on to a language model inside, which is then the target.
    """
    kind, whole = type(inner_model(target)), inner_model(assistant)
    if not isinstance(whole, torch.nn.Module) or isinstance(whole, kind) or not isinstance(whole, GenerationMixin):
        return assistant
    parts = [part for part in whole.modules() if type(part) is kind]
    return parts[0] if len(parts) == 1 else assistant
