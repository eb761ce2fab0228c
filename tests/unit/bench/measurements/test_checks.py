# SPDX-License-Identifier: Apache-2.0
"""`polyspec measure checks`: whole drafts are kept, and three times come out of it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from hf_polyspec.bench.measurements import checks


def test_three_times_of_drafts_that_are_kept(capsys: pytest.CaptureFixture[str]) -> None:
    found = checks.check_times(3, 50, 2)
    assert set(found) == {"greedy", "sampled", "draw"}
    assert all(value > 0 for value in found.values())
    checks.main(["--vocabulary", "40", "--widths", "1", "2", "--repeats", "2"])
    assert "2 tokens: greedy" in capsys.readouterr().out


def test_cold_answers_are_greedy_ones(target: Any, middle: Any) -> None:
    prompt = {"input_ids": torch.tensor([[5, 6, 7, 5, 6]]), "attention_mask": torch.ones(1, 5, dtype=torch.long)}
    found = checks.answer_times(target, [middle, "suffix"], prompt, 9, 1)
    assert found.pop("tokens") == 9
    assert set(found) == {"greedy", "sampled", "draw"}
    assert all(value > 0 for value in found.values())


def test_an_answer_with_a_tie_is_left_out(target: Any) -> None:
    """Where all ids are equally likely, the race decides and not the first id."""
    prompt = {"input_ids": torch.tensor([[5, 6, 7]]), "attention_mask": torch.ones(1, 3, dtype=torch.long)}
    even = copy.deepcopy(target)
    with torch.no_grad():
        even.get_output_embeddings().weight.zero_()
    assert checks.answer_times(even, ["suffix"], prompt, 4, 1) == {}
