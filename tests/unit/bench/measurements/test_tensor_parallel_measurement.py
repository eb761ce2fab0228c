# SPDX-License-Identifier: Apache-2.0
"""`polyspec measure tensor-parallel`: what counts as equal, as a tie, and as another text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from hf_polyspec.bench.measurements.tensor_parallel import CALLS, Together, random_llama, random_prompts

CALL = CALLS[0]
SAMPLED = {"name": "sampled", "levels": ["suffix"], "sampled": True, "apart": True}
DRAWN = {**SAMPLED, "name": "drawn", "rule": "token"}


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Together:
    scratch = tmp_path_factory.mktemp("together")
    model, head = random_llama(scratch)
    return Together(model, head, random_prompts(2, 211), scratch, new_tokens=6)


def answers(*texts: list[list[int]]) -> list[dict[str, Any]]:
    return [{"rows": rows, "passes": 3} for rows in texts]


def test_two_processes_write_what_one_does(both: Together) -> None:
    for line in both.lines(2, [CALL, SAMPLED, DRAWN]):
        assert line.errors == ()
        assert (line.texts, line.equal, line.ties) == (2, 2, 0)
        assert 0 < line.passes <= line.tokens == 6


@pytest.mark.parametrize("call", [CALL, SAMPLED])
def test_another_text_is_no_tie(both: Together, call: dict[str, Any]) -> None:
    plain = both.plain(bool(call.get("sampled")))
    other = [plain[0], [*plain[1][:4], (plain[1][4] + 1) % 211, plain[1][5]]]
    assert both._line(call, answers(other, other)).equal == 1
    assert both._line(call, answers(other, other)).ties == 0
    one = both._line(call, answers(plain, other))  # two processes that part ways are no tie either
    assert (one.equal, one.ties) == (1, 0)


def test_ids_that_are_as_likely_are_a_tie(both: Together) -> None:
    plain = both.plain(False)
    first = plain[0][3]
    twin = (first + 1) % 211
    weight = both.target.lm_head.weight
    kept = weight[twin].clone()
    with torch.no_grad():
        weight[twin] = weight[first] * (1 + 1e-7)
    try:
        both._reference = None
        other = [[*plain[0][:3], twin, *plain[0][4:]], plain[1]]
        assert both._line(CALL, answers(other, other)).ties == 1
    finally:
        with torch.no_grad():
            weight[twin] = kept
        both._reference = None


def test_a_process_that_raised_is_the_line(both: Together) -> None:
    line = both._line(CALL, [*answers(both.plain(False)), {"name": CALL["name"], "error": "ValueError: no"}])
    assert line.errors == ("ValueError: no",)
    assert "ValueError: no" in str(line)


def test_models_and_prompts_are_the_same_at_every_call(tmp_path: Path) -> None:
    folders = [random_llama(tmp_path / name)[0] for name in ("a", "b")]
    weights = [(Path(folder) / "model.safetensors").read_bytes() for folder in folders]
    assert weights[0] == weights[1]
    padded = random_prompts(3, 211)
    assert padded["attention_mask"].sum(1).tolist() == [8, 9, 10]
    assert torch.equal(padded["input_ids"], random_prompts(3, 211)["input_ids"])
