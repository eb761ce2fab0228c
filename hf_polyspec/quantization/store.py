# SPDX-License-Identifier: Apache-2.0
"""Layers already rounded, kept on disk, so that a long quantisation that was interrupted goes on where it was."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from hf_polyspec.integers.weights import QuantizedWeight

_SETTINGS = "settings.json"


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
        if written.is_file() and written.read_text(encoding="utf-8") != wanted:
            raise ValueError(
                f"{folder} holds layers of an interrupted run with other settings: "
                "finish that run with its own settings, or delete the folder."
            )
        written.write_text(wanted, encoding="utf-8")

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.safetensors"

    def get(self, name: str) -> QuantizedWeight | None:
        """A finished layer, None if it is still to be done."""
        path = self._path(name)
        if not path.is_file():
            return None
        tensors = load_file(path)
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
        unfinished = self.folder / f"{name}.tmp"
        save_file(tensors, unfinished)
        unfinished.rename(self._path(name))

    def recall(self, name: str) -> Any:
        """What `remember` kept under a name, None if nothing."""
        path = self.folder / f"{name}.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None

    def remember(self, name: str, value: Any) -> None:
        """Keep the result of a step before the rounding, anything that JSON holds."""
        unfinished = self.folder / f"{name}.json.tmp"
        unfinished.write_text(json.dumps(value), encoding="utf-8")
        unfinished.rename(self.folder / f"{name}.json")

    def remove(self) -> None:
        """Delete the folder: the checkpoint is complete."""
        shutil.rmtree(self.folder)
