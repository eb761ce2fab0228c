# SPDX-License-Identifier: Apache-2.0
"""Layers already rounded, kept on disk, so that a long quantisation that was interrupted goes on where it was."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from hf_polyspec.integers.weights import QuantizedWeight
from hf_polyspec.storage.atomic import write_json, write_tensors, write_text
from hf_polyspec.storage.reading import read_json, read_tensors, read_text, reading

_SETTINGS = "settings.json"
_REMEDY = "delete it, and the same command makes it anew"


class LayerStore:
    """A folder with one file a finished layer.

    Args:
        folder: Made if need be.
        settings: Everything the rounding depends on; a folder made with other settings is refused.

    Raises:
        ValueError: The folder holds layers made with other settings.
    """

    def __init__(self, folder: Path, settings: Mapping[str, object]) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        written = folder / _SETTINGS
        wanted = json.dumps(dict(settings), sort_keys=True, default=str)
        if written.is_file() and read_text(written, "delete the folder") != wanted:
            raise ValueError(
                f"{folder} holds layers of an interrupted run with other settings: "
                "finish that run with its own settings, or delete the folder."
            )
        write_text(written, wanted)

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.safetensors"

    def get(self, name: str) -> QuantizedWeight | None:
        """A finished layer, None if it is still to be done.

        Raises:
            DamagedFileError: Its file cannot be read.
        """
        path = self._path(name)
        if not path.is_file():
            return None
        tensors = read_tensors(path, _REMEDY)
        with reading(path, _REMEDY, "it is no layer that was kept here"):
            bits, group_size = (int(value) for value in tensors.pop("format").tolist())
            return QuantizedWeight(**tensors, bits=bits, group_size=group_size)

    def put(self, name: str, weight: QuantizedWeight) -> None:
        """Keep a finished layer; the file appears whole or not at all."""
        tensors = {
            "codes": weight.codes.cpu().contiguous(),
            "scales": weight.scales.cpu().contiguous(),
            "zeros": weight.zeros.cpu().contiguous(),
            "g_idx": weight.g_idx.cpu().contiguous(),
            "format": torch.tensor([weight.bits, weight.group_size]),
        }
        write_tensors(self._path(name), tensors)

    def recall(self, name: str) -> Any:
        """What `remember` kept under a name, None if nothing."""
        path = self.folder / f"{name}.json"
        return read_json(path, object, _REMEDY) if path.is_file() else None

    def remember(self, name: str, value: Any) -> None:
        """Keep the result of a step before the rounding, anything that JSON holds."""
        write_json(self.folder / f"{name}.json", value, indent=None)

    def remove(self) -> None:
        """Delete the folder: the checkpoint is complete."""
        # The settings last: layers without them could be taken for those of another run.
        for path in self.folder.iterdir():
            if path.name != _SETTINGS and path.is_file():
                path.unlink()
        shutil.rmtree(self.folder)
