# SPDX-License-Identifier: Apache-2.0
"""The benchmarks of a head, on models so small that only the bookkeeping is tested."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import VOCABULARY, prompts, tiny

from hf_polyspec.benchmarks import draft_vocabulary, head_cost
from hf_polyspec.eagle import EagleHead, init_for


def pair() -> tuple[Any, EagleHead]:
    target = tiny(num_hidden_layers=4)
    with torch.random.fork_rng():
        torch.manual_seed(5)
        return target, init_for(target).eval()


def test_costs_are_shares_of_a_target_step() -> None:
    target, head = pair()
    costs = head_cost.measure(target, head, rows=8, context=12, repeats=3)
    assert [cost.name for cost in costs] == ["target step", "chain step", "tree level of 4", "tree level of 10"]
    assert costs[0].share == 1
    for cost in costs:
        assert cost.share == pytest.approx(cost.milliseconds / costs[0].milliseconds)
        assert cost.milliseconds > 0


def test_sizes_are_measured_over_the_same_texts() -> None:
    target, head = pair()
    inputs = [prompts(1, seed=seed) for seed in (3, 4)]
    results = draft_vocabulary.measure(target, head, inputs, (6, 12, VOCABULARY, None), new_tokens=8)
    assert [result.rows for result in results] == [6, 12, None], "a size that cuts nothing is left out"
    assert results[-1].scored == VOCABULARY
    assert results[-1].relative_speed == 1
    for result in results:
        assert 1 <= result.accepted_per_pass <= 6
        assert result.head_milliseconds > 0


def test_what_the_commands_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    target, head = pair()
    monkeypatch.setattr(head_cost, "load", lambda model, name: (target, head, None))
    monkeypatch.setattr(draft_vocabulary, "load", lambda model, name: (target, head, None))
    monkeypatch.setattr(draft_vocabulary, "_encode", lambda tokenizer, texts: [prompts(1) for _ in texts[:1]])
    head_cost.main(["--repeats", "2", "--context", "8", "--json", str(tmp_path / "cost.json")])
    draft_vocabulary.main(["--head", "x", "--sizes", "6", "--new-tokens", "6", "--json", str(tmp_path / "rows.json")])
    cost, rows = (json.loads((tmp_path / name).read_text()) for name in ("cost.json", "rows.json"))
    assert cost["costs"][0]["name"] == "target step"
    assert [one["rows"] for one in rows["results"]] == [6, None]
    assert "torch" in cost["environment"]
    shown = capsys.readouterr().out
    assert "of a target step" in shown
    assert "tokens per pass" in shown
