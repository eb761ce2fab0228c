# SPDX-License-Identifier: Apache-2.0
"""Folders as AutoGPTQ wrote them: weights named after the settings, in one file, in shards, or pickled."""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path

from hf_polyspec.storage.reading import read_json

SETTINGS = "quantize_config.json"
_INDEX = ".index.json"
# In the order in which they are looked for, and what transformers looks for in their place.
_USUAL = {".safetensors": "model.safetensors", ".bin": "pytorch_model.bin", ".pt": "pytorch_model.bin"}


@contextlib.contextmanager
def named_for_transformers(folder: Path) -> Iterator[str]:
    """A folder whose weights have the names that transformers looks for, of the same files.

    Args:
        folder: a checkpoint's, or a hub id, which is left as it is.

    Raises:
        ValueError: there are several files that could be the weights, and the settings name none.
    """
    weights = _weights(folder) if folder.is_dir() else None
    if weights is None:
        yield str(folder)
        return
    usual = _USUAL[_ending(weights)] + (_INDEX if weights.name.endswith(_INDEX) else "")
    with tempfile.TemporaryDirectory() as made:
        view = Path(made)
        for path in folder.iterdir():
            if path.name != usual:
                (view / (usual if path == weights else path.name)).symlink_to(path.resolve())
        yield str(view)


def _weights(folder: Path) -> Path | None:
    """The file of weights, or the index of its shards, where it has a name that transformers does not look for."""
    # transformers' own names come first, as in transformers
    if any(folder.glob("model*.safetensors")) or any(folder.glob("pytorch_model*.bin")):
        return None
    for ending in _USUAL:
        found = sorted([*folder.glob(f"*{ending}{_INDEX}"), *folder.glob(f"*{ending}")])
        shards = {shard for path in found if path.name.endswith(_INDEX) for shard in _shards(path)}
        found = [path for path in found if path.name not in shards]
        if len(found) > 1:
            found = _named_by_settings(folder, found)
        if found:
            return found[0]
    return None


def _shards(index: Path) -> set[str]:
    return {str(name) for name in read_json(index).get("weight_map", {}).values()}


def _named_by_settings(folder: Path, found: list[Path]) -> list[Path]:
    """The one that AutoGPTQ would read, by the name in its settings or the one it makes of them."""
    settings = read_json(folder / SETTINGS) if (folder / SETTINGS).is_file() else {}
    made = f"gptq_model-{settings.get('bits')}bit-{settings.get('group_size')}g"
    for name in (settings.get("model_file_base_name"), made):
        named = [path for path in found if name and path.name.startswith(f"{name}{_ending(path)}")]
        if len(named) == 1:
            return named
    told = json.dumps([path.name for path in found])
    raise ValueError(
        f"{folder} holds several files that could be the weights ({told}): say which in {SETTINGS} "
        '("model_file_base_name"), or take the others away.'
    )


def _ending(path: Path) -> str:
    name = path.name.removesuffix(_INDEX)
    return name[name.rindex(".") :]
