# SPDX-License-Identifier: Apache-2.0
"""Multi-token-prediction layers that transformers drops when it loads a model, from the checkpoint's own tensors.

A layer of the kind DeepSeek-V3 has is a norm of the embedding, a norm of the hidden state, a projection of both side by
side, a decoder layer like the model's, and a norm before the model's lm_head. transformers builds such layers of any
model's own parts, and loads them under the names that DeepSeek-V3 has; other checkpoints name the same parts otherwise.
"""

from __future__ import annotations

import copy
import json
import re
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from .hub_cache import cached_folder

_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
PARTS = ("enorm", "hnorm", "eh_proj", "shared_head.norm")
"""DeepSeek-V3's names of what is not the decoder layer."""
_NAMED = {
    "pre_fc_norm_embedding": "enorm",
    "mtp_emb_norm": "enorm",
    "pre_fc_norm_hidden": "hnorm",
    "mtp_hidden_norm": "hnorm",
    "fc": "eh_proj",
    "mtp_linear_proj": "eh_proj",
    "norm": "shared_head.norm",
    "final_layernorm": "shared_head.norm",
}
"""Other checkpoints' names of these."""
_APART = re.compile(r"(?:(.*)\.)?mtp\.(fc|pre_fc_norm_embedding|pre_fc_norm_hidden|norm)\.(\w+)")
_NUMBERED = re.compile(r"(?:(.*)\.)?(mtp_block|mtp_emb_norm|mtp_hidden_norm|mtp_linear_proj)\.(\d+)\.(.+)")
_LAYER = re.compile(r"(?:(.*)\.)?(mtp_)?layers\.(\d+)\.(.+)")
_SHARED = ("shared_head.head.", "embed_tokens.")
"""The model's own lm_head and embedding, which some checkpoints store once more."""

Layer = dict[str, str]
"""Names in the checkpoint by what DeepSeek-V3 would call them, without the number of the layer."""


def named_layers(names: Iterable[str], depth: int) -> list[Layer]:
    """The layers among a checkpoint's tensors; none where there are none of a layout that is known.

    Args:
        names: of all tensors; depth: decoder layers of the model itself.
    """
    groups: dict[tuple[str, int], Layer] = {}
    for name in names:
        place = _placed(name, depth)
        if place is not None and not place[2].startswith(_SHARED):
            groups.setdefault(place[:2], {})[place[2]] = name
    whole = {place: layer for place, layer in groups.items() if all(f"{part}.weight" in layer for part in PARTS[:3])}
    for prefix in dict.fromkeys(prefix for prefix, _ in whole):
        count = 0
        while (prefix, count) in whole:
            count += 1
        # A projection for all of several layers is not this kind.
        if count and (prefix, count) not in groups:
            return [whole[prefix, place] for place in range(count)]
    return []


def _placed(name: str, depth: int) -> tuple[str, int, str] | None:
    """Where a tensor belongs: what its name begins with, the layer, and the part as DeepSeek-V3 calls it."""
    if found := _APART.fullmatch(name):
        return found[1] or "", 0, f"{_NAMED[found[2]]}.{found[3]}"
    if found := _NUMBERED.fullmatch(name):
        part = "" if found[2] == "mtp_block" else f"{_NAMED[found[2]]}."
        return found[1] or "", int(found[3]), part + found[4]
    if found := _LAYER.fullmatch(name):
        before, number, part = found[1] or "", int(found[3]), found[4]
        own = bool(found[2]) or before.split(".")[-1] == "mtp"
        if not own and number < depth:
            return None
        first, _, rest = part.rpartition(".")
        part = f"{_NAMED[first]}.{rest}" if first in _NAMED else part
        return before.removesuffix("mtp").rstrip("."), number if own else number - depth, part
    return None


def whole_checkpoint(config: Any) -> Path | None:
    """The folder that a model was loaded from, in the hub's cache for a hub id, if its weights are all there.

    Args:
        config: the model's; no hub is asked.
    """
    folder = _folder(config)
    if folder is None:
        return None
    try:
        index = json.loads((folder / _INDEX).read_text(encoding="utf-8"))
        names = {str(file) for file in index["weight_map"].values()}
    except FileNotFoundError:
        names = {_SINGLE}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return folder if all((folder / name).is_file() for name in names) else None


def _tensors(folder: Path | None) -> dict[str, Path]:
    """The safetensors file of every tensor of a checkpoint on this disk; empty where there is none."""
    from safetensors import safe_open

    if folder is None:
        return {}
    index = folder / _INDEX
    if index.is_file():
        stored = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        return {str(name): folder / str(file) for name, file in stored.items()}
    single = folder / _SINGLE
    if not single.is_file():
        return {}
    with safe_open(single, framework="pt") as opened:
        return dict.fromkeys(opened.keys(), single)


def _folder(config: Any) -> Path | None:
    source = str(getattr(config, "name_or_path", None) or "")
    if not source:
        return None
    if (path := Path(source).expanduser()).is_dir():
        return path
    return cached_folder(source, getattr(config, "_commit_hash", None))


def load_named(kind: Any, model: Any, device: torch.device) -> Any:
    """transformers' model of the layers that lie in a model's checkpoint, None where none of a known layout do.

    Args:
        kind: transformers' `MtpModel`; model: the target; device: where the layers go.

    Raises:
        ValueError: there are such tensors, of a layout that is not known.
    """
    files = _tensors(_folder(model.config))
    depth = int(model.config.get_text_config(decoder=True).num_hidden_layers)
    layers = named_layers(files, depth)
    if not layers:
        odd = next((name for name in files if re.search(r"(^|\.)mtp", name)), None)
        if odd is None:
            return None
        raise ValueError(
            f"its checkpoint's tensors for several tokens at once ({odd} and others) are of another kind than "
            "DeepSeek-V3's: norms of the embedding and of the hidden state, a projection of both, one decoder layer"
        )
    # transformers reads files under DeepSeek-V3's names: these tensors are put there under them.
    with tempfile.TemporaryDirectory() as place:
        _store(layers, files, depth, model, Path(place))
        return kind.from_pretrained(_with_layers(model, len(layers), depth, place), device_map={"": device})


def _store(layers: list[Layer], files: dict[str, Path], depth: int, model: Any, place: Path) -> None:
    from safetensors import safe_open
    from safetensors.torch import save_file

    wanted = {name: f"model.layers.{depth + k}.{part}" for k, one in enumerate(layers) for part, name in one.items()}
    tensors: dict[str, torch.Tensor] = {}
    for file in dict.fromkeys(files[name] for name in wanted):
        with safe_open(file, framework="pt") as opened:
            tensors.update((wanted[name], opened.get_tensor(name)) for name in wanted if files[name] == file)
    for k in range(len(layers)):  # Ernie's end with the model's own last norm
        norm = f"model.layers.{depth + k}.{PARTS[3]}.weight"
        if norm not in tensors:
            tensors[norm] = model.get_decoder().norm.weight.detach().cpu().clone()
    save_file(tensors, place / "model.safetensors", metadata={"format": "pt"})


def read_from(model: Any, place: str) -> Any:
    """The model with a config of its own, which says that its checkpoint lies in this folder."""
    made = copy.copy(model)
    made.config = copy.deepcopy(model.config)
    made.config._name_or_path = place
    return made


def _with_layers(model: Any, count: int, depth: int, place: str) -> Any:
    """The same, where the folder holds the layers alone, of which the model's config need not tell."""
    made = read_from(model, place)
    text = made.config.get_text_config(decoder=True)
    text.num_mtp_layers = count
    for kinds, theirs, usual in (
        ("layer_types", "mtp_layer_types", "full_attention"),
        ("mlp_layer_types", "mtp_mlp_layer_types", "sparse"),
    ):
        known = getattr(text, kinds, None)
        if known and not getattr(text, theirs, None):
            setattr(text, theirs, [usual if usual in known else known[-1]] * count)
    made._keys_to_ignore_on_load_unexpected = [rf"model\.layers\.{depth + k}\." for k in range(count)]
    return made
