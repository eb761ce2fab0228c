# SPDX-License-Identifier: Apache-2.0
"""The scripts beside the recipe of the head that ships."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_models import head_for, tiny

from hf_polyspec.eagle import EagleHead

RECIPE = Path(__file__).parents[3] / "recipes" / "smollm2-eagle3"


def script(name: str, *words: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, RECIPE / name, *words], capture_output=True, text=True, check=False)


def test_weights_are_averaged(tmp_path: Path) -> None:
    target = tiny()
    heads = [head_for(target, seed=seed) for seed in (1, 2)]
    for number, head in enumerate(heads):
        head.save_pretrained(tmp_path / str(number))
    done = script("average_heads.py", tmp_path / "0", tmp_path / "1", tmp_path / "1", "--out", tmp_path / "mean")
    assert done.returncode == 0, done.stderr
    mean = EagleHead.from_pretrained(tmp_path / "mean").state_dict()
    first, second = (EagleHead.from_pretrained(tmp_path / name).state_dict() for name in ("0", "1"))
    assert any(not torch.equal(first[name], second[name]) for name in mean)
    for name, tensor in mean.items():
        torch.testing.assert_close(tensor, (first[name] + 2 * second[name]) / 3)


def test_heads_of_other_shapes_have_no_mean(tmp_path: Path) -> None:
    head_for(tiny()).save_pretrained(tmp_path / "a")
    head_for(tiny(hidden_size=16)).save_pretrained(tmp_path / "b")
    done = script("average_heads.py", tmp_path / "a", tmp_path / "b", "--out", tmp_path / "mean")
    assert done.returncode != 0
    assert "heads of other shapes have no mean" in done.stderr
    assert not (tmp_path / "mean").exists()


@pytest.mark.parametrize(("forms", "kinds"), [("requests.yaml", 6), ("requests-longer.yaml", 7)])
def test_requests_are_different_and_complete(tmp_path: Path, forms: str, kinds: int) -> None:
    out = tmp_path / "requests.jsonl"
    words = ("--forms", RECIPE / forms, "--each", "300", "--seed", "4", "--out")
    done = script("make_requests.py", *words, out)
    assert done.returncode == 0, done.stderr
    made = [json.loads(line)["prompt"] for line in out.read_text(encoding="utf-8").splitlines()]
    assert 1000 < len(made) <= kinds * 300
    assert len(set(made)) == len(made)
    assert not any("{" in prompt or "  " in prompt for prompt in made)
    again = tmp_path / "again.jsonl"
    script("make_requests.py", *words, again)
    assert again.read_bytes() == out.read_bytes()


def test_a_file_of_forms_that_is_not_there_is_named(tmp_path: Path) -> None:
    done = script("make_requests.py", "--forms", tmp_path / "none.yaml", "--out", tmp_path / "requests.jsonl")
    assert done.returncode == 2
    assert "there is no file" in done.stderr
    assert "none.yaml" in done.stderr
    assert not (tmp_path / "requests.jsonl").exists()


def test_a_numbered_slot_is_another_word(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(RECIPE)
    from make_requests import fill  # type: ignore[import-not-found]

    for seed in range(20):
        found = fill(random.Random(seed), "{city}, {city2}, {city}", {"city": ["a", "b"]})
        assert found in {"A, b, a", "B, a, b"}
