# SPDX-License-Identifier: Apache-2.0
"""Reading a checkpoint's config and tensors from a folder or the hub, whatever layout they are in."""

from __future__ import annotations

import os
from typing import Any

import torch

from hf_polyspec.errors import DamagedFileError
from hf_polyspec.host.modeling import cached_file
from hf_polyspec.storage import reading as storage
from hf_polyspec.storage.reading import read_json

# What `cached_file` understands of the arguments of `from_pretrained`.
HUB_ARGUMENTS = (
    "cache_dir",
    "force_download",
    "proxies",
    "token",
    "revision",
    "local_files_only",
    "subfolder",
)

_SINGLE_FILES = ("model.safetensors", "pytorch_model.bin")
_INDEX_FILES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")


def read_config(source: str, hub: dict[str, Any]) -> dict[str, Any]:
    """Reads `config.json`.

    Args:
        source: Folder or hub id.
        hub: Arguments for the hub, of `HUB_ARGUMENTS`.

    Returns:
        The config as written.

    Raises:
        OSError: If there is none.
        DamagedFileError: If it is not a JSON object.
    """
    path = _find(source, "config.json", hub)
    if path is None:
        raise OSError(f"{source!r} has no config.json, so it is not an EAGLE head.")
    config: dict[str, Any] = read_json(path)
    return config


def read_tensors(
    source: str, hub: dict[str, Any], prefer_safetensors: bool = True, variant: str | None = None
) -> dict[str, torch.Tensor]:
    """Reads all tensors of a checkpoint, safetensors first, else pickled files with weights only.

    Args:
        source: Folder or hub id.
        hub: Arguments for the hub, of `HUB_ARGUMENTS`.
        prefer_safetensors: Look for safetensors files before `.bin` files.
        variant: Middle name of the files, as `fp16` in `model.fp16.safetensors`.

    Returns:
        Tensors by the names they are stored under, on the CPU.

    Raises:
        OSError: If there are no weights.
        DamagedFileError: If a file cannot be read; the sentence names it.
    """
    order = slice(None) if prefer_safetensors else slice(None, None, -1)
    tried = []
    for single, index in zip(_SINGLE_FILES[order], _INDEX_FILES[order], strict=True):
        for name, read in ((single, _read_whole), (index, _read_shards)):
            tried.append(_named(name, variant))
            path = _find(source, tried[-1], hub)
            if path is not None:
                return read(source, path, hub)
    raise OSError(f"{source!r} has no weights (looked for {', '.join(tried)}).")


def _named(name: str, variant: str | None) -> str:
    stem, _, ending = name.rpartition(".")
    return name if variant is None else f"{stem}.{variant}.{ending}"


def _find(source: str, name: str, hub: dict[str, Any]) -> str | None:
    path: str | None = cached_file(source, name, _raise_exceptions_for_missing_entries=False, **hub)
    return path


def _read_whole(source: str, path: str, hub: dict[str, Any]) -> dict[str, torch.Tensor]:
    return _read_file(path)


def _read_file(path: str) -> dict[str, torch.Tensor]:
    if path.endswith(".safetensors"):
        return storage.read_tensors(path)
    loaded = storage.read_state(path)
    tensors = loaded.get("state_dict", loaded) if isinstance(loaded, dict) else None
    if not isinstance(tensors, dict):
        raise DamagedFileError(path, "it holds no tensors by name", storage.AGAIN)
    return {name: tensor for name, tensor in tensors.items() if torch.is_tensor(tensor)}


def _read_shards(source: str, index_path: str, hub: dict[str, Any]) -> dict[str, torch.Tensor]:
    index = read_json(index_path)
    with storage.reading(index_path, what="it says not which file holds what (weight_map)"):
        shards = sorted(set(index["weight_map"].values()))
    tensors: dict[str, torch.Tensor] = {}
    for shard in shards:
        if os.path.basename(shard) != shard:
            raise OSError(f"The weight index of {source!r} points outside its folder: {shard!r}.")
        path = _find(source, shard, hub)
        if path is None:
            raise OSError(f"{source!r} names the shard {shard!r} in its index but does not have it.")
        tensors.update(_read_file(path))
    return tensors
