# SPDX-License-Identifier: Apache-2.0
"""What `polyspec measure replay` counts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hf_polyspec.bench.measurements.replay import WAYS, built, measure
from hf_polyspec.cli import app


@pytest.mark.parametrize("kind", ["qwen3_next", "mamba2"])
def test_what_is_fed_in_every_way(kind: str) -> None:
    model = built(kind, 128, 4)
    found = {rate.way: rate for rate in measure(kind, model, 2, 0.5, draft=3, rounds=11, turns=1)}
    assert list(found) == list(WAYS)
    before, short, replayed = found.values()
    assert (replayed.columns, replayed.passes) == (4, 1)  # a draft and the token before it, once
    assert (before.columns, before.passes) == (short.columns, short.passes)
    assert short.columns > 8
    assert short.passes >= 1
    assert all(rate.milliseconds > 0 and rate.parameters == found[rate.way].parameters for rate in found.values())


def test_drafts_that_are_accepted_leave_nothing_to_replay() -> None:
    rates = measure("mamba2", built("mamba2", 128, 4), 1, 1.0, draft=3, rounds=5, turns=1)
    assert {(rate.columns, rate.passes) for rate in rates} == {(4, 1)}


def test_the_command_writes_what_it_prints(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--kind", "mamba2", "--width", "128", "--layers", "4", "--rows", "1", "--accepted", "0.5"]
    app(["measure", "replay", *words, "--rounds", "3", "--json", str(tmp_path / "f.json")], standalone_mode=False)
    rates = json.loads((tmp_path / "f.json").read_text())["rates"]
    assert [rate["way"] for rate in rates] == list(WAYS)
    said = capsys.readouterr().out
    assert "mamba2" in said
    assert "medians of 3 turns of 3 rounds" in said
