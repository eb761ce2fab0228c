# SPDX-License-Identifier: Apache-2.0
"""`polyspec quantize`, on a tiny model with a tokenizer made here."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from rich.console import Console
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedModel, PreTrainedTokenizerFast
from typer.testing import CliRunner

from hf_polyspec.cli.quantize import quantize_command
from hf_polyspec.errors import DamagedFileError, FolderInUseError
from hf_polyspec.quantization import SpeedRatio, load_quantized
from hf_polyspec.quantization.measure import Comparison
from hf_polyspec.quantization.modules import quantized_layers
from hf_polyspec.quantization.report import Report, print_report
from hf_polyspec.quantization.store import LayerStore
from hf_polyspec.storage.locks import one_writer

Tiny = Callable[..., PreTrainedModel]


@pytest.fixture(scope="module")
def folder(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    sizes = {"hidden_size": 64, "intermediate_size": 96, "max_position_embeddings": 512}
    tiny("llama", initializer_range=0.1, **sizes).save_pretrained(path)
    words = {"<unk>": 0, "the": 1, "a": 2, "how": 3, "what": 4, "write": 5, "is": 6, "to": 7, "of": 8}
    words.update({f"word{index}": index for index in range(len(words), 48)})
    tokenizer = Tokenizer(WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>").save_pretrained(path)
    return path


def _run(*arguments: str) -> Any:
    app = typer.Typer()
    app.command()(quantize_command)
    return CliRunner().invoke(app, list(arguments))


def test_checkpoint_and_report(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = _run("--model", str(folder), "--out", str(out))
    assert result.exit_code == 0, result.output
    assert len(quantized_layers(load_quantized(out))) == 15
    report = json.loads((out / "quantization_report.json").read_text())
    assert report["greedy"]["agreement"] > 0.97
    assert report["sampled"]["tokens"] == 6 * 64
    assert [point["rows"] for point in report["speed"]] == [1, 4, 8, 16]
    assert not (out / "unfinished").exists()
    assert (out / "tokenizer.json").exists()
    assert "agreement" in result.output
    again = _run("--model", str(folder), "--out", str(out))
    assert "already holds a checkpoint" in str(again.exception)


def test_calibrated_and_mixed(folder: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("how is the word12 word20\n\nwrite a word33 of word40 word41\n")
    out = tmp_path / "out"
    result = _run(
        "--model", str(folder), "--out", str(out), "--bits", "4", "--group-size", "32", "--method", "gptq",
        "--high-share", "0.3", "--calibration", str(text), "--no-report",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    widths = [layer.bits for name, layer in quantized_layers(load_quantized(out)).items() if name != "lm_head"]
    assert widths.count(8) > 0
    assert widths.count(4) > widths.count(8)
    assert not (out / "quantization_report.json").exists()


def test_interrupted_run_goes_on(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from hf_polyspec.quantization import model as room

    out, calls = tmp_path / "out", []
    plain = room.round_layer

    def counting(*arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return plain(*arguments)

    monkeypatch.setattr(room, "round_layer", counting)
    assert _run("--model", str(folder), "--out", str(out), "--no-report").exit_code != 0
    assert _run("--model", str(folder), "--out", str(out), "--no-report", "--bits", "4").exit_code != 0
    assert len(calls) == 6
    assert _run("--model", str(folder), "--out", str(out), "--no-report").exit_code == 0
    assert len(calls) == 6 + 15 - 5


@pytest.mark.parametrize("step", ["save_quantized", "LayerStore.remove"])
def test_a_run_killed_in_its_last_steps_goes_on(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    """While the checkpoint is written nothing of it is to be seen; once it is, what is unfinished tells of the rest."""
    from hf_polyspec.cli import quantize
    from hf_polyspec.storage import folders

    out, arguments = tmp_path / "out", ("--model", str(folder), "--no-report", "--out")
    with monkeypatch.context() as patch:
        if step == "save_quantized":
            patch.setattr(folders, "_settle", _killed)
        else:
            patch.setattr(quantize.LayerStore, "remove", _killed)
        with pytest.raises(Killed):
            _run(*arguments, str(out))
    assert (out / "config.json").exists() == (step != "save_quantized")
    assert (out / "tokenizer.json").exists()
    assert (out / "unfinished").exists()
    result = _run(*arguments, str(out))
    assert result.exit_code == 0, result.output
    assert not (out / "unfinished").exists()
    assert len(quantized_layers(load_quantized(out))) == 15
    assert "already holds" in str(_run(*arguments, str(out)).exception)


def test_two_runs_on_one_folder_are_not_possible(folder: Path, tmp_path: Path) -> None:
    with one_writer(tmp_path / "out" / "unfinished"):
        result = _run("--model", str(folder), "--out", str(tmp_path / "out"), "--no-report")
    assert isinstance(result.exception, FolderInUseError)


def test_a_damaged_layer_of_an_interrupted_run_is_named(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    store = LayerStore(out / "unfinished", {})
    (out / "unfinished" / "layer.safetensors").write_bytes(b"half")
    with pytest.raises(DamagedFileError, match=r"layer\.safetensors is damaged .*makes it anew"):
        store.get("layer")
    (out / "unfinished" / "texts.json").write_text("[[1,")
    with pytest.raises(DamagedFileError, match=r"texts\.json is damaged"):
        store.recall("texts")


class Killed(BaseException):
    """Nobody catches it."""


def _killed(*_: Any) -> None:
    raise Killed


@pytest.mark.parametrize(
    "arguments",
    [
        ("--bits", "5"),
        ("--method", "nonsense"),
        ("--target-agreement", "0.9"),
        ("--bits", "4", "--target-agreement", "1.5"),
        ("--bits", "4", "--target-agreement", "0.9", "--high-share", "0.1"),
        ("--recover", "--recover-steps", "0"),
        ("--high-share", "2"),
        ("--group-size", "0"),
        ("--calibration", "nowhere.txt"),
    ],
)
def test_bad_options_end_before_any_work(folder: Path, tmp_path: Path, arguments: tuple[str, ...]) -> None:
    result = _run("--model", str(folder), "--out", str(tmp_path / "out"), *arguments)
    assert isinstance(result.exception, ValueError)
    assert not (tmp_path / "out").exists()


def test_bits_by_agreement_and_awq(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = _run(
        "--model", str(folder), "--out", str(out), "--bits", "2", "--group-size", "32", "--method", "awq",
        "--target-agreement", "0.93", "--no-report", "--calibration-tokens", "24",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "layers at 8 bits: agreement" in result.output
    widths = {layer.bits for name, layer in quantized_layers(load_quantized(out)).items() if name != "lm_head"}
    assert widths == {2, 8}


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")
def test_recovery_is_reported_and_survives_a_kill(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hf_polyspec.quantization import recovery

    pytest.importorskip("peft")
    arguments = (
        "--model", str(folder), "--out", str(tmp_path / "out"), "--bits", "2", "--group-size", "32", "--recover",
        "--recover-steps", "11", "--recover-rank", "4", "--recover-rate", "0.01", "--recover-samples", "1",
        "--calibration-tokens", "24",
    )  # fmt: skip
    plain = recovery._chosen

    def killed(count: int, step: int, options: recovery.RecoveryOptions) -> list[int]:
        if step == 10:
            raise KeyboardInterrupt
        return plain(count, step, options)

    monkeypatch.setattr(recovery, "_chosen", killed)
    assert _run(*arguments).exit_code != 0
    steps: list[int] = []

    def counted(count: int, step: int, options: recovery.RecoveryOptions) -> list[int]:
        steps.append(step)
        return plain(count, step, options)

    monkeypatch.setattr(recovery, "_chosen", counted)
    result = _run(*arguments)
    assert result.exit_code == 0, result.output
    assert steps == [10]
    assert "Recovery" in result.output
    report = json.loads((tmp_path / "out" / "quantization_report.json").read_text())
    before, after = report["recovered"]
    assert 0 < before < 1
    assert ("won nothing" in result.output) == (after <= before)


@pytest.mark.parametrize("method", ["autoround", "gptqmodel"])
def test_a_missing_library_is_named(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    result = _run("--model", str(folder), "--out", str(tmp_path / "out"), "--bits", "4", "--method", method)
    assert isinstance(result.exception, ImportError)
    assert "pip install" in str(result.exception)
    assert len(str(result.exception)) < 160
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("ratios", "said"), [((0.5, 0.9), "SLOWER"), ((0.9, 1.5), "not faster"), ((1.1, 1.5), "")])
def test_a_slow_result_is_called_slow(ratios: tuple[float, float], said: str) -> None:
    found = Comparison(0.9, 0.9, 5.0, 4.9, 100)
    speed = [SpeedRatio(rows, ratio, ratio, ratio) for rows, ratio in zip((1, 8), ratios, strict=True)]
    console = Console(record=True, width=120, file=io.StringIO())
    print_report(Report(100, 50, found, found, speed, 1), console)
    text = console.export_text()
    assert said in text
    assert ("SLOWER" in text) == (said == "SLOWER")
    assert ("not faster" in text) == (said == "not faster")


def test_torch_random_state_is_left_alone(folder: Path, tmp_path: Path) -> None:
    torch.manual_seed(11)
    expected = torch.rand(1)
    torch.manual_seed(11)
    _run("--model", str(folder), "--out", str(tmp_path / "out"))
    assert torch.equal(torch.rand(1), expected)
