# SPDX-License-Identifier: Apache-2.0
"""What `polyspec measure batches` times, what it says of it, and which bounds it looks at."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_models import in_circles, tiny

from hf_polyspec.bench.measurements import batch_jobs, batches, joining
from hf_polyspec.bench.measurements.batch_bounds import bounds
from hf_polyspec.bench.measurements.batch_jobs import Job

RAGGED = {
    "input_ids": torch.tensor([[0, 0, 3, 4], [9, 8, 7, 6]]),
    "attention_mask": torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]]),
}


class Words:
    """A tokenizer of characters."""

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": [ord(letter) % 30 + 1 for letter in text]}


def test_pieces_of_a_run_are_put_together(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = in_circles(tiny())
    monkeypatch.setattr(batches, "targets_of", lambda given: [("float32", target, Words())])
    monkeypatch.setattr(batches, "jobs", lambda *given: [Job("unequal", "unequal", 2, RAGGED)])
    monkeypatch.setattr(batches, "prompts", lambda *given: RAGGED)
    first, whole = tmp_path / "first.json", tmp_path / "whole.json"
    common = ["--chain", "suffix", "--new-tokens", "9", "--rounds", "1"]
    batches.main([*common, "--prompts", "unequal", "--slots", "--json", str(first)])
    kept = json.loads(first.read_text())
    ways = [batches.PADDED, batches.ALONE, "suffix"]
    assert [(one["way"], one["form"], one["batch"]) for one in kept["rates"]] == [(way, "float32", 2) for way in ways]
    assert [(one["tokens"], one["alike"]) for one in kept["rates"]] == [(18, 2)] * 3
    assert all(0 < one["first"] < one["seconds"] for one in kept["rates"])
    assert kept["rates"][0]["ratio"] == kept["rates"][1]["to_alone"] == kept["rates"][1]["decoding"] == 1
    assert kept["joining"] == []
    capsys.readouterr()
    batches.main([*common, "--prompts", "--slots", "2", "--with", str(first), "--json", str(whole)])
    both = json.loads(whole.read_text())
    assert both["rates"] == kept["rates"]
    assert [(one["way"], one["alike"]) for one in both["joining"]] == [(joining.ALONE, 2), ("suffix", 2)]
    told = capsys.readouterr().out
    assert "bounds" in told
    assert "not measured" in told


def test_one_thread_counts_its_own_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    clocks = []
    monkeypatch.setattr(batches, "targets_of", lambda given: [("float32", None, Words())])
    monkeypatch.setattr(batches, "jobs", lambda *given: [Job("unequal", "unequal", 2, RAGGED)])
    monkeypatch.setattr(batches, "measure", lambda *given, clock, **options: clocks.append(clock) or [])
    before = torch.get_num_threads()
    try:
        batches.main(["--prompts", "unequal", "--slots"])
        assert torch.get_num_threads() == before
        batches.main(["--prompts", "unequal", "--slots", "--one-thread"])
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)
    assert clocks == [time.perf_counter, time.thread_time]


def test_what_is_no_earlier_piece_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = tmp_path / "other.json"
    other.write_text('{"rates": [{"way": "plain"}], "joining": []}')
    with pytest.raises(SystemExit):
        batches.main(["--with", str(other)])
    assert "is no file that --json of this command wrote" in capsys.readouterr().err


def test_several_texts_of_one_prompt_are_those_of_plain_generation() -> None:
    target = in_circles(tiny())
    job = batch_jobs.jobs(Words(), "sequences", [1, 3])
    assert [one.rows for one in job] == [3]  # one text of a prompt is no batch
    assert job[0].inputs["input_ids"].shape == (1, batch_jobs.EQUAL)
    short = {name: value[:, :5] for name, value in job[0].inputs.items()}
    rates = batches.measure(target, replace(job[0], inputs=short), ["suffix"], new_tokens=6, rounds=1)
    assert [rate.alike for rate in rates] == [3, 3, 3]
    assert [rate.tokens for rate in rates] == [18] * 3


def test_kinds_of_prompts(tmp_path: Path) -> None:
    unequal = batch_jobs.jobs(Words(), "unequal", [1, 8])
    assert [int(job.inputs["attention_mask"].sum()) for job in unequal] == [40, 1793]
    assert unequal[1].inputs["input_ids"].shape == (8, 769)
    equal = batch_jobs.jobs(Words(), "equal", [3])[0]
    assert (equal.inputs["input_ids"] == equal.inputs["input_ids"][0]).all()
    assert bool(equal.inputs["attention_mask"].all())


def rate(way: str, batch: int, **more: object) -> batches.Rate:
    values = {"form": "bfloat16+pack", "prompts": "unequal", "name": "unequal", "ratio": 1.0, "to_alone": 1.0}
    numbers = {"tokens": 1, "seconds": 1.0, "first": 0.5, "per_second": 1.0, "decoding": 1.0, "alike": 1}
    return batches.Rate(way=way, batch=batch, **{**values, **numbers, **more})  # type: ignore[arg-type]


def test_bounds_hold_or_are_missed() -> None:
    rates = [
        rate("auto", 1, prompts="tasks", name="qa", ratio=3.0, to_alone=2.5),
        rate("auto", 1, prompts="tasks", name="rag", ratio=1.5, to_alone=1.4),
        rate("auto", 4, ratio=5.0, to_alone=1.1, decoding=1.25),
        rate("auto", 16, prompts="equal", name="equal", ratio=0.98, to_alone=0.96),
        rate("suffix", 16, ratio=0.1, to_alone=0.1),
        rate(batches.ALONE, 8, ratio=3.1),
        rate("auto", 4, form="bfloat16+int8", ratio=1.2, decoding=0.9),
    ]
    joined = [
        joining.Rate("bfloat16+pack", way, 8, 1, 1.0, 0.5, 1.0, ratio, 1, 1)
        for way, ratio in ((joining.ALONE, 1.0), ("suffix", 1.06), ("int8,suffix", 0.9))
    ]
    found = {bound.what: bound for bound in bounds(rates, joined)}
    of_form = "bfloat16+pack: "
    told = {what.removeprefix(of_form): (one.told, one.verdict) for what, one in found.items() if of_form in what}
    assert told == {
        "auto, slowest batch beside plain": ("0.96 (batch 16, equal)", "MISSED"),
        "auto, batch 1, mean of tasks": ("2.25", "holds"),
        "auto, batch 4, decoding": ("1.25 (with the prompts 1.10)", "holds"),
        "rows of their own by padded, batch 8": ("3.10", "MISSED"),
        "best chain joining, 8 slots": ("1.06 (suffix)", "holds"),
        "best chain joining, 16 slots": ("", "not measured"),
    }
    # What is promised of decoding at four rows is promised of the packed target.
    assert "bfloat16+int8: auto, batch 4, decoding" not in found
    assert found["bfloat16+int8: auto, slowest batch beside plain"].verdict == "holds"
