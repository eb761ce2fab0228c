# SPDX-License-Identifier: Apache-2.0
"""Ways in which a state that is carried on may come back wrong after a rejected draft."""

from __future__ import annotations

from typing import Any

import pytest

from hf_polyspec.host.recurrent import RecurrentRunner
from hf_polyspec.host.states import State, StateCache


def nothing(self: StateCache, state: State) -> None:
    """What a rollback that forgets the state does."""


def windows(self: StateCache, state: State) -> None:
    """What a rollback does that knows convolutions only."""
    for layer, values in zip(self.stateful, state, strict=True):
        vars(layer).update({name: value for name, value in values.items() if name.startswith("conv")})


def break_rollback(monkeypatch: pytest.MonkeyPatch, wrong: Any) -> None:
    """Have every rollback, and nothing else, put states back in a wrong way."""
    right, put = RecurrentRunner._put_back, StateCache.put

    def put_back(self: RecurrentRunner, keep: list[int]) -> None:
        StateCache.put = wrong  # type: ignore[method-assign]
        try:
            right(self, keep)
        finally:
            StateCache.put = put  # type: ignore[method-assign]

    monkeypatch.setattr(RecurrentRunner, "_put_back", put_back)
