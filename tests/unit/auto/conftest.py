# SPDX-License-Identifier: Apache-2.0
"""A cache folder of the test's own, and passes that take as long as the test says."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tiny_models import tiny
from transformers import PreTrainedModel

import hf_polyspec
from hf_polyspec.auto import choosing, copying
from hf_polyspec.auto.measuring import Alike


@pytest.fixture
def model() -> PreTrainedModel:
    return tiny("llama")


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """Profiles go here, and every model may take `assistant_models`."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    hf_polyspec.enable()
    yield tmp_path / "cache" / "hf_polyspec" / "profiles"
    hf_polyspec.disable()


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Instead of timing, passes of a machine on which packing and an int8 copy pay; what was asked for."""
    asked: list[list[str]] = []
    seconds = {"unpacked": 4.0, "target": 2.0, "int8": 0.5, "int4": 0.5}

    def told(models: dict[str, Any], sizes: dict[str, Any], *_: Any, **more: Any) -> dict[str, list[list[float]]]:
        asked.append(list(models))
        return {name: [[k, 1e-3 * seconds[name] * (1 + k / 50)] for k in sizes[name]] for name in models}

    monkeypatch.setattr(choosing, "time_passes", told)
    monkeypatch.setattr(choosing, "agreement", lambda *arguments: Alike(0.9))
    monkeypatch.setattr(copying, "MOST_SECONDS", float("inf"))  # on a busy machine anything may take 20 seconds
    return asked
