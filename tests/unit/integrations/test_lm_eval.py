# SPDX-License-Identifier: Apache-2.0
"""lm-evaluation-harness with a chain gives what it gives without one, sample by sample."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lm_eval
import pytest
import tiny_models
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from tiny_checkpoints import byte_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_polyspec.cpu.packing import is_packed
from hf_polyspec.integrations.lm_eval import PolySpecLM

# Its registries and datasets' caches speak of their own future.
pytestmark = pytest.mark.filterwarnings("ignore")
RECIPE = Path(__file__).parents[3] / "recipes" / "lm-eval"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """A model that ends no text, and a copy of it with noise, both with their tokenizer."""
    root = tmp_path_factory.mktemp("models")
    tokenizer = byte_tokenizer()
    model = tiny_models.tiny("llama", vocab_size=len(tokenizer), max_position_embeddings=512)
    for name, one in (("target", model), ("small", tiny_models.noisy(model, 0.02))):
        one.save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    return str(root / "target"), str(root / "small")


def evaluate(model: Any, monkeypatch: pytest.MonkeyPatch, cache: Path) -> dict[str, Any]:
    monkeypatch.chdir(RECIPE.parents[1])
    monkeypatch.setenv("HF_DATASETS_CACHE", str(cache))
    manager = TaskManager(include_path=str(RECIPE), include_defaults=False)
    return lm_eval.simple_evaluate(model=model, tasks=["polyspec_copying"], task_manager=manager, bootstrap_iters=0)


@pytest.mark.parametrize("batch", [1, 3])
def test_the_same_answers_in_fewer_passes(
    folders: tuple[str, str], batch: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    target, small = folders
    how: dict[str, Any] = {"pretrained": target, "device": "cpu", "dtype": "float32", "batch_size": batch}
    plain = evaluate(HFLM(**how), monkeypatch, tmp_path)
    chain = PolySpecLM(**how, assistants=f"{small}+suffix", polyspec_block_size=6)
    found = evaluate(chain, monkeypatch, tmp_path)
    assert found["results"] == plain["results"]
    answers = [[each["resps"] for each in one["samples"]["polyspec_copying"]] for one in (found, plain)]
    assert answers[0] == answers[1]
    assert len({json.dumps(each) for each in answers[0]}) == 4  # four different texts
    assert chain.tokens >= 4 * 40
    assert chain.passes < 0.6 * chain.tokens


def test_a_packed_copy_of_a_model_that_is_given(
    folders: tuple[str, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    given = AutoModelForCausalLM.from_pretrained(folders[0])
    forwards = [vars(layer).get("forward") for layer in given.modules()]
    how: dict[str, Any] = {"pretrained": given, "tokenizer": AutoTokenizer.from_pretrained(folders[0])}
    model = PolySpecLM(**how, assistants="suffix", pack=True)
    assert is_packed(model.model)
    found = evaluate(model, monkeypatch, tmp_path)
    plain = evaluate(HFLM(**how), monkeypatch, tmp_path)
    assert found["results"] == plain["results"]
    assert [vars(layer).get("forward") for layer in given.modules()] == forwards


def test_auto_chooses_in_each_call(folders: tuple[str, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "profiles"))
    how: dict[str, Any] = {"pretrained": folders[0], "device": "cpu", "dtype": "float32"}
    plain = evaluate(HFLM(**how), monkeypatch, tmp_path)
    model = PolySpecLM(**how, assistants="auto")
    found = evaluate(model, monkeypatch, tmp_path)
    assert found["results"] == plain["results"]
    assert 0 < model.passes <= model.tokens
    assert list((tmp_path / "profiles").rglob("*.json"))  # it was measured


def test_what_cannot_work_is_refused_before_anything_is_evaluated(folders: tuple[str, str]) -> None:
    with pytest.raises(ValueError, match="suffix only drafts"):
        PolySpecLM(pretrained=folders[0], device="cpu", assistants="suffix+int8")
    with pytest.raises(ValueError, match="polyspec_block_size"):
        PolySpecLM(pretrained=folders[0], device="cpu", polyspec_block_size=0)
