# SPDX-License-Identifier: Apache-2.0
"""How levels are multiplied on this machine, asked only where a chain runs."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch

from ..levels.verifier import Verifier
from .chain import levels_of


def packed(assistants: list[Any], model: Any) -> AbstractContextManager[None]:
    """Assistants packed for this processor for the length of a call."""
    from ..cpu.packing import packed_assistants

    return packed_assistants(assistants, model)


def note_kernels(chain: Verifier) -> None:
    """Let every level's statistics say what is to be known of how it is multiplied on this machine."""
    from ..cpu.notes import notes

    for level in levels_of(chain):
        runner = getattr(level, "runner", None)
        model = getattr(level, "head", None) if runner is None else runner.model
        if isinstance(model, torch.nn.Module):
            level.stats.notes.extend(notes(model))
