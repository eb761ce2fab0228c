# SPDX-License-Identifier: Apache-2.0
"""A target's features on disk, so that only the first epoch pays for the target's forward passes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hf_polyspec.eagle.training.dataset import Batch, TargetReader, Text
from hf_polyspec.eagle.training.kept_states import Seen, as_kept
from hf_polyspec.eagle.training.losses import TargetView
from hf_polyspec.errors import DamagedFileError
from hf_polyspec.storage.atomic import allocate, write_json
from hf_polyspec.storage.reading import read_json


class FeatureCache:
    """Reads through to the target and remembers, in half precision, what it said about each text.

    A text takes `2 * (F + H_t) + 4` bytes a token. A text is marked as remembered after its values are written, so
    a killed run leaves no half-written text behind. Several processes may share the folder.

    Args:
        folder: where the arrays are kept.
        reader: asks the target.
        texts: every text that may be asked for.
        feature_size: width F of the features.
        final_size: width H_t of what the target's lm_head reads.
        target_name: part of what makes a cache valid.
        owner: whether this process creates the arrays; the others wait for it before opening theirs.
    """

    def __init__(
        self,
        folder: Path,
        reader: TargetReader,
        texts: Sequence[Text],
        feature_size: int,
        final_size: int,
        target_name: str,
        owner: bool = True,
    ) -> None:
        self.reader = reader
        self.starts: dict[int, int] = {}
        self.texts = {text.number: text for text in texts}
        total = 0
        for text in texts:
            self.starts[text.number] = total
            total += len(text)
        self.index = {text.number: row for row, text in enumerate(texts)}
        shapes: dict[str, tuple[tuple[int, ...], Any]] = {
            "features": ((total, feature_size), np.float16),
            "final": ((total, final_size), np.float16),
            "best": ((total,), np.int32),
            "done": ((len(texts),), np.uint8),
        }
        folder.mkdir(parents=True, exist_ok=True)
        stamp = _stamp(texts, reader.layers, target_name, feature_size)
        marker = folder / "cache.json"
        sizes = {name: int(np.prod(shape)) * np.dtype(dtype).itemsize for name, (shape, dtype) in shapes.items()}
        if owner and not (_stamped(marker, stamp) and _whole(folder, sizes)):
            marker.unlink(missing_ok=True)
            for name, size in sizes.items():
                # with its room on the disk: storing into a map that finds none would end the process
                allocate(folder / name, size)
            write_json(marker, {"stamp": stamp})
        self.arrays = {
            name: np.memmap(folder / name, dtype=dtype, mode="r+", shape=shape)
            for name, (shape, dtype) in shapes.items()
        }

    @property
    def remembered(self) -> int:
        """How many texts need no forward pass of the target."""
        return int(self.arrays["done"].sum())

    def read(self, batch: Batch) -> TargetView:
        """What the target says about a batch; see `TargetReader.read`."""
        done = self.arrays["done"]
        unknown = [row for row, text in enumerate(batch.texts) if not done[self.index[text.number]]]
        if unknown:
            asked = batch.only(unknown)
            self._remember(asked, self.reader.read(asked))
        # rounded in the first epoch as in all others, so that a resumed run computes the same numbers
        return self._recall(batch)

    def adopt(self, number: int, seen: Seen) -> None:
        """Takes what a writer computed for the reader's word on a text.

        Args:
            number: the text's; one that is not in the cache or remembered already is passed over.
            seen: of its ids but the last, which nothing is read of.
        """
        row = self.index.get(number)
        if row is None or self.arrays["done"][row]:
            return
        text = self.texts[number]
        known, width = min(len(text), len(seen.best)), self.arrays["features"].shape[1]
        place = slice(self.starts[number], self.starts[number] + known)
        self.arrays["features"][place] = seen.states[:known, :width]
        self.arrays["final"][place] = seen.states[:known, width:]
        # as a reader leaves it: 0 where the next id is not of the answer
        self.arrays["best"][place] = np.where(np.arange(known) < text.prompt_length - 1, 0, seen.best[:known])
        self.arrays["done"][row] = 1

    def _remember(self, batch: Batch, view: TargetView) -> None:
        parts = {
            "features": as_kept(view.features).numpy(),
            "final": as_kept(view.final).numpy(),
            "best": view.best.cpu().numpy(),
        }
        for row, text in enumerate(batch.texts):
            start, length = self.starts[text.number], len(text)
            for name, values in parts.items():
                self.arrays[name][start : start + length] = values[row, :length]
            self.arrays["done"][self.index[text.number]] = 1

    def _recall(self, batch: Batch) -> TargetView:
        device = batch.tokens.device
        rows, longest = batch.tokens.shape
        dtype = self.reader.target.dtype
        found: dict[str, torch.Tensor] = {}
        for name in ("features", "final", "best"):
            array = self.arrays[name]
            padded = np.zeros((rows, longest, *array.shape[1:]), dtype=array.dtype)
            for row, text in enumerate(batch.texts):
                start = self.starts[text.number]
                padded[row, : len(text)] = array[start : start + len(text)]
            found[name] = torch.from_numpy(padded).to(device)
        return TargetView(found["features"].to(dtype), found["final"].to(dtype), found["best"].long())


def _stamped(marker: Path, stamp: str) -> bool:
    """Whether a cache is of these texts; one whose marker cannot be read is of none, and is begun anew."""
    try:
        return marker.is_file() and read_json(marker).get("stamp") == stamp
    except DamagedFileError:
        return False


def _whole(folder: Path, sizes: dict[str, int]) -> bool:
    """Whether no array was cut short."""
    return all((folder / name).is_file() and (folder / name).stat().st_size == size for name, size in sizes.items())


def _stamp(texts: Sequence[Text], layers: Sequence[int], target_name: str, feature_size: int) -> str:
    digest = hashlib.sha256(json.dumps([list(layers), target_name, feature_size]).encode())
    for text in texts:
        digest.update(np.int64(text.number).tobytes())
        digest.update(text.tokens.tobytes())
    return digest.hexdigest()
