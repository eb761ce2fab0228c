# SPDX-License-Identifier: Apache-2.0
"""`polyspec export`: one command for each program that reads heads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from tiny_models import tiny
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from hf_polyspec.cli import app
from hf_polyspec.cli import export as command
from hf_polyspec.eagle import EagleHead, init_for

WIDTH = {"COLUMNS": "300", "TERM": "dumb"}


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A target's folder, and that of a head which scores with all of its target's rows."""
    root = tmp_path_factory.mktemp("pair")
    target = root / "target"
    tiny("llama", num_hidden_layers=8).save_pretrained(target)
    head = init_for(AutoModelForCausalLM.from_pretrained(target), "eagle3", own_lm_head=False)
    head.save_pretrained(root / "head")
    return target, root / "head"


def polyspec(*words: object) -> Any:
    return CliRunner().invoke(app, ["export", *map(str, words)], env=WIDTH)


@pytest.mark.parametrize("to", ["vllm", "sglang", "eagle", "speculators"])
def test_each_program(pair: tuple[Path, Path], tmp_path: Path, to: str) -> None:
    target, head = pair
    done = polyspec(head, tmp_path / "out", "--to", to, "--target", target)
    assert done.exit_code == 0, done.output
    assert f"written to {tmp_path / 'out'}" in done.output
    assert str(target) in done.output or to == "speculators"
    held = load_file(tmp_path / "out" / "model.safetensors").keys()
    assert ("lm_head.weight" in held) == (to in ("eagle", "speculators"))
    assert isinstance(EagleHead.from_pretrained(tmp_path / "out"), EagleHead)


def test_a_target_whose_rows_are_not_wanted_is_not_loaded(
    pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, head = pair
    monkeypatch.setattr(command, "load_model", lambda *_: pytest.fail("the weights were read"))
    done = polyspec(head, tmp_path / "out", "--to", "vllm", "--target", target, "--verifier", "org/name")
    assert done.exit_code == 0, done.output
    config = json.loads((tmp_path / "out" / "config.json").read_text())["speculators_config"]
    assert config["verifier"] == {"name_or_path": "org/name", "architectures": ["LlamaForCausalLM"]}
    assert "vllm serve org/name" in done.output


def test_tokens_a_round_are_told(pair: tuple[Path, Path], tmp_path: Path) -> None:
    target, head = pair
    done = polyspec(head, tmp_path / "out", "--to", "vllm", "--target", target, "--speculative-tokens", "5")
    assert '"num_speculative_tokens": 5' in done.output
    config = json.loads((tmp_path / "out" / "config.json").read_text())["speculators_config"]
    assert config["proposal_methods"] == [{"proposal_type": "greedy", "speculative_tokens": 5}]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--to", "tgi"], "--to must be one of vllm, sglang, eagle, speculators, got 'tgi'"),
        (["--to", "eagle"], "name it with --target"),
        (["--to", "vllm"], "give verifier"),
        (["--to", "vllm", "--verifier", "a/b", "--speculative-tokens", "0"], "--speculative-tokens must be at least 1"),
    ],
)
def test_mistakes_end_with_one_sentence(pair: tuple[Path, Path], tmp_path: Path, words: list[str], told: str) -> None:
    done = polyspec(pair[1], tmp_path / "out", *words)
    assert done.exit_code == 2
    assert told in done.output
    assert "Traceback" not in done.output
    assert not (tmp_path / "out").exists()


def test_nothing_is_replaced_unasked(pair: tuple[Path, Path], tmp_path: Path) -> None:
    target, head = pair
    words = (head, tmp_path, "--to", "sglang", "--target", target)
    assert polyspec(*words).exit_code == 0
    again = polyspec(*words)
    assert again.exit_code == 2
    assert "config.json" in again.output
    assert "--overwrite" in again.output
    assert polyspec(*words, "--overwrite").exit_code == 0


def test_a_head_that_does_not_fit_is_refused(pair: tuple[Path, Path], tmp_path: Path) -> None:
    wide = tmp_path / "wide"
    config = AutoModelForCausalLM.from_pretrained(pair[0]).config
    config.hidden_size = 64
    AutoModelForCausalLM.from_config(config).save_pretrained(wide)
    done = polyspec(pair[1], tmp_path / "out", "--to", "vllm", "--target", wide)
    assert done.exit_code == 2
    assert "wide" in done.output
