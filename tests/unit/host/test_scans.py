# SPDX-License-Identifier: Apache-2.0
"""Scans over the columns of a draft are no longer than that, and nothing of it stays behind."""

from __future__ import annotations

import inspect
import threading
from typing import Any

import pytest
import torch
from tiny_models import tiny

from hf_polyspec.bench.measurements.tiny_models import tiny_model
from hf_polyspec.exactness.context import Context, Prompt
from hf_polyspec.host import scans
from hf_polyspec.host.manners import runner_for
from hf_polyspec.host.modeling import AutoModelForCausalLM
from hf_polyspec.host.named_code import state_writers
from hf_polyspec.host.scans import Ears, Scan
from hf_polyspec.telemetry.counters import LevelStats

KINDS = ["mamba2", "qwen3_next", "kimi_linear", "nemotron_h"]
PROMPT, DRAFT = [5, 9, 3, 7, 11], [4, 8, 30, 2]


def _made(kind: str) -> Any:
    if kind == "mamba2":
        return tiny(kind, attention="eager", state_size=8, num_heads=4, head_dim=16, n_groups=1, chunk_size=32)
    return tiny_model(kind, AutoModelForCausalLM)


def _files(model: Any) -> list[dict[str, Any]]:
    """The names beside the classes of a model's layers with a state."""
    return [inspect.unwrap(type(part).forward).__globals__ for part in state_writers(model)]


@torch.no_grad()
def _read(model: Any) -> torch.Tensor:
    """Logits after a draft, which is read behind a prompt."""
    runner, stats = runner_for(model, "read"), LevelStats("read", 0)
    prompt = Prompt(len(PROMPT), None, torch.arange(len(PROMPT))[None])
    runner.run(Context([PROMPT], prompt), [[]], stats)
    return runner.run(Context([[*PROMPT, 6]], prompt), [DRAFT], stats).logits[0]


@pytest.mark.parametrize("kind", KINDS)
def test_chunks_are_as_long_as_the_draft(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = _made(kind)
    before = [dict(names) for names in _files(model)]
    right, asked = scans.fit, []

    def watched(scan: Scan) -> None:
        given = scan.given.get("chunk_size", inspect.signature(scan.function).parameters["chunk_size"].default)
        right(scan)
        asked.append((given, scan.columns, scan.given["chunk_size"]))

    runner_for(model, "tried")  # by then it is known how the model is served
    monkeypatch.setattr(scans, "fit", watched)
    found = _read(model)
    assert asked
    # One column of those that are read singly is a step and no scan.
    assert all(1 + len(DRAFT) - (kind == "nemotron_h") == wide == size < usual for usual, wide, size in asked)
    monkeypatch.setattr(scans, "fit", lambda scan: None)
    wanted = _read(model)
    assert float((found - wanted).abs().max()) < 1e-4 * float(wanted.abs().max())
    assert all(names == dict(now) for names, now in zip(before, _files(model), strict=True))


def test_chunks_of_a_kernel_are_its_own() -> None:
    """Code for a GPU is compiled for the sizes that it is asked for."""

    def kernel(query: torch.Tensor, chunk_size: int = 64, initial_state: Any = None) -> None: ...

    given = {"query": torch.zeros(1, 3, 2), "initial_state": torch.zeros(1, device="meta")}
    scans.fit(scan := Scan(kernel, dict(given), "initial_state"))
    assert "chunk_size" not in scan.given
    scans.fit(scan := Scan(kernel, {**given, "initial_state": torch.zeros(1)}, "initial_state"))
    assert scan.given["chunk_size"] == 3


@torch.no_grad()
def test_passes_of_other_threads_are_left_alone() -> None:
    """Both that hear something and that do not; the functions are themselves again when the last has done with them."""
    model = _made("qwen3_next")
    ears, told = Ears(model), dict[str, list[Scan]](here=[], there=[])
    names = _files(model)[0]
    before = dict(names)
    placed, done = threading.Event(), threading.Event()

    def other() -> None:
        with torch.no_grad():
            model(input_ids=torch.tensor([PROMPT]))
            with ears.hearing(told["there"].append):
                placed.set()
                assert done.wait(240)

    thread = threading.Thread(target=other)
    with ears.hearing(told["here"].append):
        thread.start()
        assert placed.wait(240)
        during = dict(names)
    assert during != before
    assert dict(names) == during  # the other still listens
    done.set()
    thread.join()
    assert dict(names) == before
    assert told == {"here": [], "there": []}
