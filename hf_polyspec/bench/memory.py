# SPDX-License-Identifier: Apache-2.0
"""How much memory a call needs: its peak above what was there before, and the weights of the models in it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import psutil
import torch

_CLEAR, _STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")


class PeakMeter:
    """Measures the peak of one call, on the accelerator where there is one, else of the process.

    Linux forgets a process's peak when asked to; elsewhere the peak of a process on the CPU is not known, and what it
    holds after the call is reported in its place.

    Args:
        device: where the models are.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._before = 0

    def start(self) -> None:
        """Forget earlier peaks."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            self._before = torch.cuda.memory_allocated(self.device)
            return
        with contextlib.suppress(OSError):
            _CLEAR.write_text("5")
        self._before = int(psutil.Process().memory_info().rss)

    def stop(self) -> tuple[int, int]:
        """The peak since `start`, and how far it is above what was held then, both in bytes."""
        on_cuda = self.device.type == "cuda"
        peak = int(torch.cuda.max_memory_allocated(self.device)) if on_cuda else _process_peak()
        return peak, max(0, peak - self._before)


def _process_peak() -> int:
    with contextlib.suppress(OSError):
        for line in _STATUS.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return int(psutil.Process().memory_info().rss)


def weight_bytes(models: Iterable[Any]) -> int:
    """Bytes of all parameters and buffers of some models, those they share counted once."""
    storages: dict[int, int] = {}
    for model in models:
        if isinstance(model, torch.nn.Module):
            for tensor in (*model.parameters(), *model.buffers()):
                storage = tensor.untyped_storage()
                storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())
