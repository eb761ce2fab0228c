# SPDX-License-Identifier: Apache-2.0
"""Seconds of work on an accelerator, which goes on after the call that asked for it."""

from __future__ import annotations

import torch


def wait_for(device: torch.device | str) -> None:
    """Return when everything that was asked of a device has been computed."""
    kind = torch.device(device).type
    if kind == "cuda":
        torch.cuda.synchronize(device)
    elif kind == "mps":
        torch.mps.synchronize()
    elif kind == "xpu":
        torch.xpu.synchronize(device)
