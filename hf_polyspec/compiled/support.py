# SPDX-License-Identifier: Apache-2.0
"""Whether compiled functions can run on this machine."""

from __future__ import annotations

import platform
import sys
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import torch


@cache
def compiles() -> bool:
    """Whether numba is installed, and the CPU and torch's threads are of the kind this package's functions use.

    That is Linux on x86 with AVX2, and a torch that brings GNU's or Intel's OpenMP, as the wheels do.
    """
    return (
        sys.platform == "linux"
        and platform.machine() == "x86_64"
        and "AVX" in torch.backends.cpu.get_cpu_capability()
        and find_spec("numba") is not None
        and threads_library() is not None
    )


@cache
def threads_library() -> Path | None:
    """The OpenMP that torch runs on. A second one would have threads that wait for the same cores."""
    folder = Path(torch.__file__).parent / "lib"
    return next((path for name in ("libgomp*.so*", "libiomp5.so") for path in sorted(folder.glob(name))), None)
