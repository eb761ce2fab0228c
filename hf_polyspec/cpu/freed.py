# SPDX-License-Identifier: Apache-2.0
"""Memory that a layer gives back and the next one takes again."""

from __future__ import annotations

from contextlib import suppress
from functools import cache

import torch

LARGEST = 31 << 20
"""Bytes. glibc learns from blocks of up to 32 MiB."""


@cache
def keep_freed() -> None:
    """Let the C library keep what one layer gives back for the next one, up to 62 MiB of it.

    glibc returns the end of its heap to the system when more lies free there than twice the largest block of its own
    mapping that was ever freed, and what the system hands out again it has filled with zeros, page by page: reading
    1800 ids that took 0.3 of 1.5 s. So such a block is freed here, once a process; nothing is written to it. A program
    that has set these thresholds itself keeps them, and elsewhere than in glibc nothing comes of it.
    """
    with suppress(RuntimeError, MemoryError):  # as little memory as that: then nothing is to be kept either
        torch.empty(LARGEST, dtype=torch.uint8, device="cpu")
