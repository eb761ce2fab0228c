# SPDX-License-Identifier: Apache-2.0
"""Ways that take turns, in `polyspec measure batches`, `joining` and `auto`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tiny_models import in_circles, tiny

from hf_polyspec.bench.measurements import batches, ways


def test_the_order_moves_on_and_the_turn_that_warms_does_not_count() -> None:
    seen: list[tuple[str, int]] = []

    def call(way: str, turn: int) -> float:
        seen.append((way, turn))
        return 10.0 * turn + len(seen)

    assert ways.in_turns(call, ["a", "b"], 2) == {"a": [3, 16], "b": [4, 15]}
    assert seen == [("b", -1), ("a", -1), ("a", 0), ("b", 0), ("b", 1), ("a", 1)]
    seen.clear()
    assert ways.in_turns(call, ["a"], 1, warms=False) == {"a": [1]}


def test_rates_of_a_batch(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = in_circles(tiny())
    inputs = {"input_ids": torch.tensor([[0, 0, 3, 4], [9, 8, 7, 6]]), "attention_mask": torch.ones(2, 4).long()}
    inputs["attention_mask"][0, :2] = 0
    monkeypatch.setattr(batches, "target_of", lambda given: (target, None))
    monkeypatch.setattr(batches, "prompts", lambda *arguments: inputs)
    wanted = tmp_path / "rates.json"
    batches.main(["--batch", "2", "--chain", "suffix", "--new-tokens", "9", "--rounds", "1", "--json", str(wanted)])
    rates = json.loads(wanted.read_text())["rates"]
    assert [rate["way"] for rate in rates] == [batches.PADDED, batches.ALONE, "suffix"]
    assert [(rate["batch"], rate["tokens"], rate["alike"]) for rate in rates] == [(2, 18, 2)] * 3
    assert rates[0]["ratio"] == 1
    assert "medians of 1 in turns" in capsys.readouterr().out
