# SPDX-License-Identifier: Apache-2.0
"""Hooks on modules: which are the host's own, left there for good once somebody has asked for hidden states."""

from __future__ import annotations

from typing import Any

from transformers.utils import output_capturing

CAPTURING = output_capturing.__name__
"""The module that the host's own are from."""
NAMES = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
"""Where torch keeps a module's hooks."""


def is_hosts(hook: Any) -> bool:
    """Whether a hook is one with which transformers collects what a pass is asked to show, and does nothing else."""
    return bool(getattr(hook, "__module__", "") == CAPTURING)


def is_hooked(module: Any) -> bool:
    """Whether anybody else has put hooks on this module."""
    state = module.__dict__
    return any(not is_hosts(hook) for name in NAMES if state.get(name) for hook in state[name].values())
