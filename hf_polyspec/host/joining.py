# SPDX-License-Identifier: Apache-2.0
"""The runner of a level whose rows join while others run."""

from __future__ import annotations

from typing import Any

import torch

from .manners import runner_for
from .own_rows import rows_apart
from .ragged import RaggedRunner
from .runner import ModelRunner
from .separate import SeparateRunner
from .states import keeps_states


def joining_runner(model: Any, name: str, device: torch.device | None = None, **options: Any) -> ModelRunner:
    """A runner without rows, which takes them as they come (`ModelRunner.add_rows`).

    Rows share passes where the model reads rows that each have their own columns; elsewhere each has a runner of its
    own.

    Args:
        model, name, device, options: as for `runner_for`.
    """
    options.pop("rows", None), options.pop("columns", None)
    extras = options.get("extras")
    if not keeps_states(model) and (extras is None or not extras.any) and rows_apart(model):
        return RaggedRunner(model, name, device, rows=0, **{k: v for k, v in options.items() if k != "kept"})
    return SeparateRunner(runner_for, model, name, device, **options)
