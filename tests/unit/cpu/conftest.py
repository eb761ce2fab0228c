# SPDX-License-Identifier: Apache-2.0
"""What tests of blocks that are computed together count and turn off."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from hf_polyspec.cpu import fused_block


@pytest.fixture
def tasks(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many blocks every task computed."""
    from hf_polyspec.cpu.compiled import whole_block, whole_stack

    found: list[int] = []
    run = whole_block.run_blocks

    def counted(*given: Any) -> None:
        found.append(given[2])
        run(*given)

    monkeypatch.setattr(whole_block, "run_blocks", counted)
    monkeypatch.setattr(whole_stack, "run_blocks", counted)
    return found


@pytest.fixture
def one_by_one(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], Any]], Any]:
    """Calls something with every block in a task of its own."""

    def call(function: Callable[[], Any]) -> Any:
        with monkeypatch.context() as patched:
            patched.setattr(fused_block, "stack_output", lambda *_: None)
            return function()

    return call
