# SPDX-License-Identifier: Apache-2.0
"""Assistants by name: what a user writes after `--assistant` becomes a member of the chain."""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

import torch

from ..cpu.joint_product import change_count
from ..eagle.formats.files import read_config, read_tensors
from ..errors import DamagedFileError
from ..levels.early_exit import PREFIX, early_exit, parse_early_exit
from ..levels.names import name_of
from ..levels.suffix import SuffixDrafter
from ..levels.synthetic import parse_synthetic
from ..quantization import quantize_model
from .by_name import load_model, read_dtype, resolve

_BITS = {"int8": 8, "int4": 4}
_EAGLE_MODEL_TYPE = "polyspec_eagle"


def load_assistant(name: str, target: Any, dtype: str | torch.dtype, device: str | torch.device) -> Any:
    """A member of a chain under `target`.

    Args:
        name: `suffix`, `int8`, `int4`, `early-exit:12` (the target's first 12 layers), `smollm2-eagle3` (the head that
            ships with this package), or a hub id or folder of a model or an EAGLE head.
        target: the loaded target, which quantised copies are made from.
        dtype, device: for models that are loaded.

    Returns:
        A drafter, model or head, as `generate(assistant_models=[...])` takes them.

    Raises:
        ValueError: nothing of this name can be loaded, or the target cannot be quantised.
    """
    if name == "suffix":
        return SuffixDrafter(eos=end_ids(target))
    synthetic = parse_synthetic(name, target)
    if synthetic is not None:
        return synthetic
    if name in _BITS:
        return quantized_copy(target, _BITS[name])
    layers = parse_early_exit(name)
    if layers is not None:
        return early_exit(target, layers)
    if is_eagle_head(name):
        from ..eagle import EagleHead

        # Heads are stored in 16 bits, which CPUs multiply slowly: one runs in the type that was asked for.
        wanted = read_dtype(dtype)
        wanted = target.dtype if wanted == "auto" else wanted
        return EagleHead.from_pretrained(resolve(name)[0], dtype=wanted).to(device).eval()
    return load_model(name, dtype, device)


_Stamp = tuple[object, ...]
_MADE: WeakKeyDictionary[Any, dict[str, tuple[_Stamp, Any]]] = WeakKeyDictionary()


def by_name(target: Any, assistants: Any) -> Any:
    """Members of a chain, those made that are names of what a target itself gives: `int8`, `early-exit:12`, `suffix`.

    What is made of a target is kept for as long as the target lives, and made again when its weights have changed.

    Args:
        target: the model generate() was called on.
        assistants: as the user gave them; what is no such name is handed back as it is, for others to refuse.

    Raises:
        ValueError: a name that cannot be made of this target.
    """
    if not isinstance(assistants, (list, tuple)) or not any(_is_made(member) for member in assistants):
        return assistants
    check_assistant_names([member if isinstance(member, str) else "" for member in assistants])
    return [_named(target, member) if _is_made(member) else member for member in assistants]


def _is_made(member: Any) -> bool:
    return isinstance(member, str) and (member == "suffix" or member in _BITS or member.startswith(PREFIX))


def _named(target: Any, name: str) -> Any:
    if name == "suffix":  # it keeps the text of its generation
        return load_assistant(name, target, target.dtype, target.device)
    stamp = _stamp(target)
    kept = _MADE.setdefault(target, {})
    if name not in kept or kept[name][0] != stamp:
        kept[name] = (stamp, load_assistant(name, target, target.dtype, target.device))
    return kept[name][1]


def _stamp(model: Any) -> _Stamp:
    """Changes whenever a weight does, or another adapter is made active."""
    weights = tuple((parameter.data_ptr(), change_count(parameter)) for parameter in model.parameters())
    adapters = {
        (tuple(module.active_adapters), module.disable_adapters)
        for module in model.modules()
        if hasattr(module, "active_adapters") and hasattr(module, "disable_adapters") and hasattr(module, "merge")
    }
    return (weights, frozenset(adapters))


def quantized_copy(model: Any, bits: int) -> Any:
    """A copy of a model with integer weights, named after its bits so that tables can tell the two apart."""
    copy: Any = quantize_model(model, bits)
    # The copy's own attribute: the original keeps its name.
    copy.name_or_path = f"{name_of(model) or type(model).__name__} int{bits}"
    return copy


def check_assistant_names(names: list[str]) -> None:
    """Refuse an impossible chain before any model is loaded.

    Raises:
        ValueError: a drafter is not the last of them, or an early exit names no layers.
    """
    for name in names:
        parse_early_exit(name)
    for name in names:
        parse_synthetic(name)
    if any(name.startswith("synthetic:") for name in names[:-1]):
        raise ValueError("a synthetic level only drafts: name it as the last --assistant.")
    if "suffix" in names[:-1]:
        raise ValueError("suffix only drafts and cannot check what another proposes: name it as the last --assistant.")


def end_ids(model: Any) -> list[int]:
    """The ids that end a text of this model."""
    ids = getattr(model.generation_config, "eos_token_id", None)
    if ids is None:
        return []
    return list(ids) if isinstance(ids, (list, tuple)) else [int(ids)]


def is_eagle_head(name: str) -> bool:
    """Whether a folder or hub id holds an EAGLE head of any published layout; False where nothing can be read.

    Raises:
        DamagedFileError: its config.json or its weights are there and cannot be read.
    """
    try:
        source, extra = resolve(name)
        config = {} if extra else read_config(source, {})
    except DamagedFileError:
        raise
    except (OSError, ValueError, ImportError):
        return False
    kind = str(config.get("speculators_model_type") or config.get("model_type") or "").lower()
    architectures = " ".join(config.get("architectures") or []).lower()
    if kind == _EAGLE_MODEL_TYPE or kind.startswith("eagle") or "eagle" in architectures:
        return True
    if "eagle_config" in config or "draft_vocab_size" in config:
        return True
    # Official EAGLE-1 heads call themselves Llama models of one layer; only their tensors tell.
    return config.get("num_hidden_layers") == 1 and _has_fusing_projection(source)


def _has_fusing_projection(source: str) -> bool:
    try:
        names = set(read_tensors(source, {}))
    except DamagedFileError:
        raise
    except (OSError, ValueError):
        return False
    return "fc.weight" in names and "model.embed_tokens.weight" not in names
