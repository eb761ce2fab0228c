# SPDX-License-Identifier: Apache-2.0
"""A middle without a second checkpoint: the target's own first layers with its own norm and lm_head."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..host.ranks import is_split, is_spread
from ..host.release import inner_model
from ..host.whole import shell_of
from ..quantization.modules import sharing_copy
from .names import name_of

PREFIX = "early-exit"
_PROBE = (1, 2, 3)


def early_exit(model: Any, layers: int) -> Any:
    """The first layers of a model, followed by its own final norm and lm_head: a cheaper level for a chain.

    All weights are shared with the model, so it costs no memory; its cache is its own, and the model, its config and
    its generation config stay as they were. How far its distribution is from the model's depends on how the model was
    trained: models trained to exit early agree well, others may need all but a few layers (measure it with
    `hf_polyspec.quantization.agreement`).

    Args:
        model: A causal LM of transformers, or a PEFT model around one (its adapters stay in effect).
        layers: How many layers to keep, from 1 to one less than the model has.

    Returns:
        A model of the same class, in eval mode.

    Raises:
        TypeError: `layers` is no integer.
        ValueError: `layers` is out of range, or the model's layers cannot be cut; the sentence names the model.
    """
    base = inner_model(model)
    kind = type(base).__name__
    if isinstance(layers, bool) or not isinstance(layers, int):
        raise TypeError(f"layers must be an integer, got {layers!r}.")
    place = layer_list(base)
    depth = len(base.get_submodule(place))
    if not 1 <= layers < depth:
        raise ValueError(f"An early exit of {kind} keeps 1 to {depth - 1} of its {depth} layers, got {layers}.")
    if is_spread(base):
        raise ValueError(
            f"An early exit of {kind} would need passes of its own, in which all processes that hold its weights in "
            "parts (FSDP2) take part; gather them first."
        )
    parent, _, leaf = place.rpartition(".")
    copy = shell_of(base, parent) if is_split(base) else sharing_copy(base).eval()
    kept = list(copy.get_submodule(place))[:layers]
    setattr(copy.get_submodule(parent), leaf, nn.ModuleList(kept))
    _shorten(copy.config.get_text_config(decoder=True), layers, depth)
    _check_same_layers(base, copy, place, layers)
    copy.name_or_path = f"{name_of(base) or kind} exit {layers}"
    return copy


def layer_list(model: Any) -> str:
    """Where a model keeps its decoder layers.

    Args:
        model: A causal LM.

    Returns:
        The name of the one outermost `ModuleList` that is as long as its config says the model is deep.

    Raises:
        ValueError: There is none, or more than one.
    """
    kind = type(model).__name__
    depth = getattr(model.config.get_text_config(decoder=True), "num_hidden_layers", None)
    if depth is None:
        raise ValueError(f"The config of {kind} does not tell how many layers it has, so it cannot be exited early.")
    found: list[str] = []
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{outer}.") for outer in found)
        if isinstance(module, nn.ModuleList) and len(module) == depth and not inside:
            found.append(name)
    # A multimodal model's towers may be as deep as its decoder, and come before it.
    if len(found) > 1:
        decoders = [name for name in found if "vision" not in name and "audio" not in name and "visual" not in name]
        found = decoders or found
    if len(found) != 1:
        many = "no list" if not found else f"{len(found)} lists ({', '.join(found)})"
        raise ValueError(f"{kind} has {many} of {depth} layers, so it cannot be told which to keep for an early exit.")
    return found[0]


def parse_early_exit(name: str) -> int | None:
    """The number of layers in an assistant's name `early-exit:N`; None for any other name.

    Raises:
        ValueError: the name starts that way and no number of layers follows.
    """
    head, _, rest = name.partition(":")
    if head != PREFIX:
        return None
    if not rest.isascii() or not rest.isdigit() or int(rest) < 1:
        raise ValueError(f"{name!r} needs a number of layers: {PREFIX}:12 keeps the first 12.")
    return int(rest)


def _shorten(config: Any, layers: int, depth: int) -> None:
    """Make a config, which is this copy's own, that of a model of `layers` layers."""
    for name, value in list(vars(config).items()):
        # Kinds of layers, sizes by layer: whatever is listed by layer.
        if isinstance(value, (list, tuple)) and len(value) == depth and name != "architectures":
            setattr(config, name, value[:layers])
    shared = getattr(config, "num_kv_shared_layers", None)
    if isinstance(shared, int) and shared:
        config.num_kv_shared_layers = max(0, layers - (depth - shared))
    config.num_hidden_layers = layers


@torch.no_grad()
def _check_same_layers(model: Any, copy: Any, place: str, layers: int) -> None:
    """Compare what leaves the last kept layer in both; refuse an architecture whose parts know its depth.

    Raises:
        ValueError: the copy cannot run, or computes something else.
    """
    kind = type(model).__name__
    device = model.get_input_embeddings().weight.device
    if device.type == "meta":
        return
    ids = torch.tensor([_PROBE], device=device)
    last = f"{place}.{layers - 1}"
    with _output_of(model, last) as wanted:
        model(input_ids=ids, use_cache=False)
    try:
        with _output_of(copy, last) as found:
            copy(input_ids=ids, use_cache=False)
    except (RuntimeError, IndexError, AttributeError, TypeError, ValueError) as error:
        reason = str(error).splitlines()[0][:160] if str(error) else type(error).__name__
        raise ValueError(
            f"{kind} cannot be cut to {layers} layers for an early exit, other parts of it depend on its depth "
            f"({reason}); use a quantised copy (int8) as the middle instead."
        ) from error
    if not wanted or not found or not torch.allclose(wanted[-1].float(), found[-1].float(), rtol=1e-3, atol=1e-3):
        raise ValueError(
            f"The first {layers} layers of {kind} compute something else when the others are cut off, so it cannot be "
            "exited early; use a quantised copy (int8) as the middle instead."
        )


@contextmanager
def _output_of(model: Any, name: str) -> Iterator[list[Tensor]]:
    """Hidden states that leave a layer while the block runs."""
    seen: list[Tensor] = []

    def keep(_module: nn.Module, _inputs: Any, output: Any) -> None:
        state = output[0] if isinstance(output, tuple) else output
        if isinstance(state, Tensor):
            seen.append(state.detach())

    hook = model.get_submodule(name).register_forward_hook(keep)
    try:
        yield seen
    finally:
        hook.remove()
