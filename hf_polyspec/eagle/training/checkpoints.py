# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of a training run: complete or absent, the newest ones kept."""

from __future__ import annotations

import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from hf_polyspec.storage.folders import put_folder
from hf_polyspec.storage.reading import reading


@dataclass
class RunState:
    """Where a run stands; saved with every checkpoint.

    Args:
        step: optimizer steps done.
        epoch: the epoch under way.
        position: batches of that epoch already used, over all processes.
        tokens: tokens used so far, repetitions counted.
        seconds: time spent training, earlier sessions included.
        corpus: fingerprint of the training texts.
    """

    step: int = 0
    epoch: int = 0
    position: int = 0
    tokens: int = 0
    seconds: float = 0.0
    corpus: str = ""

    def state_dict(self) -> dict[str, Any]:
        """Plain values, for accelerate."""
        return asdict(self)

    def load_state_dict(self, values: dict[str, Any]) -> None:
        """Takes over saved values."""
        for name, value in values.items():
            setattr(self, name, value)


class Checkpoints:
    """The checkpoints of one run.

    Args:
        folder: where they are.
        accelerator: saves and loads weights, optimizer, scaler, random states and what is registered with it.
        keep: how many are kept.
    """

    def __init__(self, folder: Path, accelerator: Accelerator, keep: int) -> None:
        self.folder = folder
        self.accelerator = accelerator
        self.keep = keep

    def newest(self) -> Path | None:
        """The last complete checkpoint."""
        found = sorted(self.folder.glob("step-*"))
        return found[-1] if found else None

    def save(self, step: int) -> Path:
        """Writes a checkpoint under a temporary name, renames it when whole, and drops old ones.

        Args:
            step: optimizer steps done.
        """
        final = self.folder / f"step-{step:08d}"
        partial = self.folder / f"partial-{step:08d}"
        if self.accelerator.is_main_process:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        self.accelerator.wait_for_everyone()
        self.accelerator.save_state(str(partial))
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            put_folder(partial, final)
            for old in sorted(self.folder.glob("step-*"))[: -self.keep]:
                shutil.rmtree(old)
            for leftover in self.folder.glob("partial-*"):
                shutil.rmtree(leftover)
        self.accelerator.wait_for_everyone()
        return final

    def load_newest(self) -> Path | None:
        """Continues from the last complete checkpoint.

        Returns:
            Its folder, or None when there is none.

        Raises:
            DamagedFileError: it cannot be read; the sentence names it.
        """
        newest = self.newest()
        if newest is not None:
            remedy = "delete this folder, and the same command goes on from the checkpoint before it"
            with reading(newest, remedy):
                self.accelerator.load_state(str(newest))
        return newest
