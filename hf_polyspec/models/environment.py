# SPDX-License-Identifier: Apache-2.0
"""The line that belongs under every figure: machine, versions, date."""

from __future__ import annotations

import datetime
import os
import platform
from contextlib import suppress
from functools import cache
from pathlib import Path

import torch

from ..cpu.compiled import compiles
from ..host.release import installed


def describe() -> str:
    """Processor, threads, accelerator, versions and today's date, in one line."""
    parts = [
        processor(),
        f"{torch.get_num_threads()} of {os.cpu_count()} threads",
        f"torch {torch.__version__}",
        f"transformers {installed()}",
        f"Python {platform.python_version()}",
        datetime.date.today().isoformat(),
    ]
    if torch.cuda.is_available():
        parts.insert(1, torch.cuda.get_device_name())
    return ", ".join(parts)


@cache
def processor() -> str:
    """The processor's name as the system tells it, and which of its instructions are used here.

    Virtual machines of several kinds have one name, and passes take other times with other instructions.
    """
    return f"{_name()} ({', '.join(_instructions())})"


def _instructions() -> list[str]:
    found = [torch.backends.cpu.get_cpu_capability()]
    with suppress(ImportError):  # of a numba that is installed and does not run
        if compiles():
            from ..cpu.compiled.amx import TILES
            from ..cpu.compiled.pairs import PAIRED

            found += [name for name, here in (("bfloat16", PAIRED), ("AMX", TILES)) if here]
    return found


def _name() -> str:
    information = Path("/proc/cpuinfo")
    if information.exists():
        for line in information.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
