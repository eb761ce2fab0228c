# SPDX-License-Identifier: Apache-2.0
"""A model whose weights are spread over processes, put together again: for copies in fewer bits and for heads.

Putting together is done by all processes that hold a part, in the same order; who has no use for it keeps nothing.
"""

from __future__ import annotations

import copy
from collections.abc import Collection
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from .ranks import is_part

_PARTS: WeakKeyDictionary[nn.Module, tuple[tuple[object, ...], nn.Module | None]] = WeakKeyDictionary()
_EVERYWHERE: WeakKeyDictionary[nn.Module, tuple[object, ...]] = WeakKeyDictionary()
"""Modules that all processes have put together, and of which weights; known alike in all of them."""


def whole_tensor(tensor: Tensor) -> Tensor:
    """All numbers of a tensor; collective where they are spread."""
    if not is_part(tensor):
        return tensor.detach()
    part: Any = tensor
    found: Tensor = part.detach().full_tensor()
    return found


@torch.no_grad()
def whole_copy(model: Any, *, keeps: bool = True, device: torch.device | None = None) -> Any:
    """A model of the same class with all weights in this process; collective.

    Args:
        model: its weights are spread; keeps: False for a process that only hands out its parts.
        device: where the copy is put together, by default where the parts lie.

    Returns:
        The copy, in eval mode; None where nothing is kept.

    Raises:
        ValueError: its class cannot be made again from its configuration.
    """
    weights: dict[str, Tensor] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        found = whole_tensor(tensor)
        if keeps:
            weights[name] = found.to(device or found.device)
    if not keeps:
        return None
    made = made_anew(model)
    # Buffers that are not saved, such as the frequencies of rotary embeddings, are the same in every process.
    for name, buffer in model.named_buffers():
        owner, _, leaf = name.rpartition(".")
        made.get_submodule(owner)._buffers[leaf] = whole_tensor(buffer).to(device or buffer.device).clone()
    take_weights(made, weights)
    return made


def take_weights(made: Any, weights: dict[str, Tensor], left_out: Collection[str] = ()) -> None:
    """Give a model that was made anew its weights, for passes only.

    Args:
        made: by `made_anew`; weights: by name, not copied; left_out: names that need not be there.

    Raises:
        ValueError: they are others than the class has by its configuration.
    """
    strange = ValueError(
        f"{type(made).__name__} is sharded over processes or offloaded, and has weights that its configuration does "
        "not tell of (adapters, layers of another library), so that no copy of it can be made; make the copy before "
        "that, and pass it as a model."
    )
    try:
        missing, unknown = made.load_state_dict(weights, strict=False, assign=True)
    except RuntimeError as error:
        raise strange from error
    if unknown or set(missing) - set(left_out):
        raise strange
    for parameter in made.parameters():
        parameter.requires_grad_(False)
    made.eval()


def made_anew(model: Any) -> Any:
    """A model of the class that was sharded or offloaded, without weights."""
    kind = next(kind for kind in type(model).__mro__ if "FSDPModule" not in {one.__name__ for one in kind.__mro__})
    with torch.device("meta"):
        made: Any = kind(copy.deepcopy(model.config))
    for name in ("generation_config", "name_or_path"):
        if hasattr(model, name):
            setattr(made, name, copy.deepcopy(getattr(model, name)))
    made.tie_weights()
    return made


@torch.no_grad()
def whole_part(module: nn.Module, *, keeps: bool = True) -> nn.Module:
    """An embedding or lm_head that computes in this process alone; the module itself where nothing of it is spread.

    Kept as long as the module lives and its weights are the same; collective where it is made.

    Args:
        module: has no modules inside; keeps: False for a process that only hands out its parts, which gets the module.
    """
    own = module._parameters
    if not any(is_part(parameter) for parameter in own.values()):
        # FSDP2 leaves what it has gathered for a pass in its place for a while.
        return (_PARTS[module][1] if module in _PARTS else None) or module
    if module not in _PARTS or _PARTS[module][0] != _stamp(module):
        gather(module, keeps=keeps)
        if not keeps:
            _PARTS[module] = _stamp(module), None
    return _PARTS[module][1] or module


def whole_part_in_all(module: nn.Module) -> None:
    """Has `whole_part` of a module computed in every process that holds a part, also where one has it already."""
    split = any(is_part(parameter) for parameter in module._parameters.values())
    if split and _EVERYWHERE.get(module) != _stamp(module):
        gather(module, keeps=True)
        _EVERYWHERE[module] = _stamp(module)


@torch.no_grad()
def gather(module: nn.Module, *, keeps: bool) -> None:
    """Put an embedding or lm_head together, for `whole_part` to give from now on where it is kept; collective."""
    found = {name: None if p is None else whole_tensor(p) for name, p in module._parameters.items()}
    if keeps and any(is_part(parameter) for parameter in module._parameters.values()):
        _PARTS[module] = _stamp(module), _alone(module, found)


def is_put_together(module: nn.Module) -> bool:
    """Whether `whole_part` has it all in this process already."""
    if not any(is_part(parameter) for parameter in module._parameters.values()):
        return True
    kept = _PARTS.get(module)
    return kept is not None and kept[1] is not None and kept[0] == _stamp(module)


def lent_parts(model: Any) -> tuple[nn.Module | None, nn.Module | None]:
    """The embedding and the lm_head of a model, as far as it has them."""
    try:
        embedding: nn.Module | None = model.get_input_embeddings()
    except NotImplementedError:
        embedding = None
    return embedding, model.get_output_embeddings()


def _stamp(module: nn.Module) -> tuple[object, ...]:
    return tuple((id(p), getattr(p, "_version", 0)) for p in module._parameters.values())


def _alone(module: nn.Module, weights: dict[str, Tensor | None]) -> nn.Module:
    made = copy.copy(module)
    made.__dict__.pop("forward", None)  # which splits its input and gathers its output
    made.__dict__.update(
        _parameters={n: None if w is None else nn.Parameter(w, requires_grad=False) for n, w in weights.items()},
        _buffers=dict(module._buffers),
        _forward_hooks={},
        _forward_pre_hooks={},
    )
    kind = next((one for one in type(module).__mro__ if "FSDPModule" not in {k.__name__ for k in one.__mro__}), None)
    if kind is not None:
        made.__class__ = kind
    return made


def shell_of(model: Any, path: str) -> Any:
    """A model of its own down to the module `path`, with a config of its own, over the same modules beside and below.

    Layers that are split call their processes wherever they are called from; a copy of them would call the original's.
    """
    config = copy.deepcopy(model.config)
    made = _shell(model, config)
    parent = made
    for name in path.split(".") if path else ():
        child = _shell(getattr(parent, name), config)
        parent._modules[name] = child
        parent = child
    return made


def _shell(module: Any, config: Any) -> Any:
    made = copy.copy(module)
    made.__dict__["_modules"] = dict(module._modules)
    if hasattr(module, "config"):
        text = config.get_text_config(decoder=True)
        made.config = config if module.config.model_type == config.model_type else text
    return made
