# SPDX-License-Identifier: Apache-2.0
"""The runner of a level whose rows join while others run."""

from __future__ import annotations

from typing import Any

import torch

from .manners import runner_for
from .runner import ModelRunner
from .separate import SeparateRunner


def joining_runner(model: Any, name: str, device: torch.device | None = None, **options: Any) -> ModelRunner:
    """A runner without rows, which takes them as they come (`ModelRunner.add_rows`).

    Args:
        model, name, device, options: as for `runner_for`.
    """
    options.pop("rows", None)
    return SeparateRunner(runner_for, model, name, device, **options)
