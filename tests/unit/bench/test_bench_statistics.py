# SPDX-License-Identifier: Apache-2.0
"""Figures from records whose figures are known."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from hf_polyspec.bench.rundata import RunData
from hf_polyspec.bench.statistics import OVERALL, identity_rates, tabulate
from hf_polyspec.bench.tables import NONE, identity
from hf_polyspec.bench.ties import compare, tie_tolerance


def record(decoder: str, question: int, seconds: float, task: str = "qa", **more: Any) -> dict[str, Any]:
    fields = {
        "decoder": decoder,
        "method": decoder,
        "temperature": 0.0,
        "batch_size": 1,
        "task": task,
        "question_id": str(question),
        "group": str(question),
        "turn": 0,
        "row": 0,
        "own": 1,
        "output_ids": [question, 7],
        "prompt_sha": "x",
        "seconds": seconds,
        "group_tokens": 10,
        "target_passes": None,
        "peak_bytes": 5,
        "rise_bytes": 2,
        "levels": [],
    }
    return fields | more


def test_speed_ups_are_of_paired_questions_with_all_turns_together() -> None:
    lines = [record("plain", i, 1.0) for i in range(6)] + [record("polyspec:a", i, 0.5) for i in range(5)]
    lines += [record("plain", 0, 3.0, turn=1), record("polyspec:a", 0, 0.5, turn=1)]
    cell = tabulate(lines).cells["polyspec:a", 1, 0.0]["qa"]
    # Question 0: 20 tokens in 1 s against 20 in 4 s; the four others 20 against 10 tokens a second.
    assert cell.mean_of_ratios == pytest.approx((4 + 2 * 4) / 5)
    assert cell.ratio_of_means == pytest.approx(20 / ((5 + 10 * 4) / 5))
    assert cell.mean_of_ratios_interval is not None
    assert cell.mean_of_ratios_interval[0] < 2.4 < cell.mean_of_ratios_interval[1]
    assert tabulate(lines).cells["polyspec:a", 1, 0.0]["qa"].mean_of_ratios_interval == cell.mean_of_ratios_interval
    assert tabulate(lines).cells["plain", 1, 0.0]["qa"].mean_of_ratios_interval == (1.0, 1.0)


def test_overall_every_task_weighs_the_same() -> None:
    lines = [record("plain", i, 1.0, task) for task, n in (("qa", 5), ("rag", 1)) for i in range(n)]
    lines += [record("polyspec:a", i, 0.5) for i in range(5)] + [record("polyspec:a", 0, 0.25, "rag")]
    cell = tabulate(lines).cells["polyspec:a", 1, 0.0][OVERALL]
    assert cell.mean_of_ratios == pytest.approx((2 + 4) / 2)
    assert cell.tokens_per_second == pytest.approx((20 + 40) / 2)
    assert cell.mean_of_ratios_interval is not None


def test_batches_are_compared_with_plain_batches() -> None:
    lines = [record("plain", 1, 1.0), record("plain", 1, 2.0, batch_size=4, group="1+1+1+1")]
    lines.append(record("polyspec:a", 1, 1.0, batch_size=4, group="1+1+1+1"))
    assert tabulate(lines).cells["polyspec:a", 4, 0.0]["qa"].mean_of_ratios == pytest.approx(2.0)


def test_levels_are_summed_over_calls() -> None:
    level = {"forward_passes": 2, "seconds": 0.1, "rounds": 2, "accepted": 3, "recovered": 1, "bonus": 1, "drafted": 4}
    level |= {"name": "target", "acceptance_histogram": [0, 1, 1]}
    lines = [record("polyspec:a", i, 1.0, levels=[level]) for i in range(2)]
    (found,) = tabulate(lines).cells["polyspec:a", 1, 0.0]["qa"].levels
    assert (found.passes, found.rounds, found.emitted, found.histogram) == (4, 4, 10, [0, 2, 2])
    assert found.mean_length == pytest.approx(2.5)


def test_identity_counts_only_answers_to_the_same_prompt() -> None:
    lines = [record("plain", i, 1.0) for i in range(3)]
    lines += [record("polyspec:a", 0, 1.0), record("polyspec:a", 1, 1.0, output_ids=[1, 8])]
    lines.append(record("polyspec:a", 2, 1.0, prompt_sha="y"))
    assert identity_rates(lines)["polyspec:a"] == (1, 2)


def test_identity_with_another_method() -> None:
    lines = [record("plain", i, 1.0) for i in range(3)]
    lines += [record("plain-packed", i, 1.0, output_ids=[i, 8]) for i in range(3)]
    lines += [record("polyspec:a", i, 1.0, output_ids=[i, 8 if i else 9]) for i in range(3)]
    assert identity_rates(lines)["polyspec:a"] == (0, 3)
    assert identity_rates(lines, "plain-packed")["polyspec:a"] == (2, 3)
    assert not identity_rates(lines[:3], "plain-packed")
    shown = identity(_run(lines))
    assert shown.header[-1] == "identical to plain-packed"
    assert [(row[0], row[-1]) for row in shown.rows] == [("plain-packed", NONE), ("polyspec:a", "2 of 3 (67%)")]
    shown = identity(_run([line for line in lines if line["decoder"] != "plain-packed"]))
    assert "identical to plain-packed" not in shown.header
    assert len(shown.rows[0]) == len(shown.header)


def _run(lines: list[dict[str, Any]]) -> RunData:
    facts = {"dtype": "bfloat16", "order": ["plain", "plain-packed", "polyspec:a"]}
    return RunData(Path(), {}, facts, [], lines, [], [], {}, {})


class OneLogit:
    """A model whose last logits are given."""

    dtype, device = torch.float32, torch.device("cpu")

    def __init__(self, logits: list[float]) -> None:
        self.logits = torch.tensor([[logits]])

    def __call__(self, input_ids: torch.Tensor, logits_to_keep: int) -> Any:
        self.seen = input_ids.tolist()
        return self


class Letters:
    def decode(self, ids: list[int]) -> str:
        return "".join("abcdef"[i] for i in ids)


def test_a_difference_is_a_tie_only_within_rounding_and_only_at_the_top() -> None:
    model = OneLogit([1.0, 9.0, 9.00001, 2.0])
    assert compare(model, Letters(), [5], [0, 1], [0, 1]) is None
    found = compare(model, Letters(), [5], [0, 1, 3], [0, 2])
    assert found is not None
    assert (found["position"], found["texts"], found["tie"]) == (1, ["b", "c"], True)
    assert model.seen == [[5, 0]]
    assert found["gap"] == pytest.approx(1e-5, rel=0.1)
    apart = compare(model, Letters(), [5], [0, 1], [0, 3])
    assert apart is not None
    assert apart["gap"] == pytest.approx(7.0)
    assert not apart["tie"]
    low = compare(OneLogit([1.0, 1.0, 9.0]), Letters(), [5], [0], [1])
    assert low is not None
    assert not low["tie"]
    shorter = compare(model, Letters(), [5], [0], [0, 1])
    assert shorter is not None
    assert shorter["logits"] is None
    assert not shorter["tie"]
    # Asked in float32 about texts of bfloat16, whose steps are the wider ones.
    wide = OneLogit([1.0, 9.0, 9.1, 2.0])
    for dtype, tie in ((None, False), (torch.bfloat16, True)):
        asked = compare(wide, Letters(), [5], [0, 1], [0, 2], dtype=dtype)
        assert asked is not None
        assert asked["tie"] is tie
        assert asked["dtype"] == ("bfloat16" if tie else "float32")


def test_the_tolerance_of_a_tie_follows_the_dtype() -> None:
    assert tie_tolerance(torch.bfloat16, 16.0) == pytest.approx(8 * 2**-7 * 16)
    assert tie_tolerance(torch.float32, 16.0) < 2e-4
