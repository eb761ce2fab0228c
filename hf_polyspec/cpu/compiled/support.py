# SPDX-License-Identifier: Apache-2.0
"""Whether compiled functions can run on this machine."""

from __future__ import annotations

import platform
import sys
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


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


def computes(x: Tensor) -> bool:
    """Whether compiled functions take these activations `[B, F, H]`: plain numbers without gradients."""
    return (
        compiles()
        and type(x) is Tensor
        and x.dim() == 3
        and x.numel() > 0
        and x.device.type == "cpu"
        and x.dtype in DTYPES
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
    )


@cache
def threads_library() -> Path | None:
    """The OpenMP that torch runs on. A second one would have threads that wait for the same cores."""
    folder = Path(torch.__file__).parent / "lib"
    return next((path for name in ("libgomp*.so*", "libiomp5.so") for path in sorted(folder.glob(name))), None)
