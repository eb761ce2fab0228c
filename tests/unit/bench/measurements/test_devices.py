# SPDX-License-Identifier: Apache-2.0
"""`--device` of measurements: the model goes there, what it reads too, and seconds count until it has computed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_checkpoints import byte_tokenizer
from tiny_models import prompts, tiny

from hf_polyspec.bench.measurements import auto, batches, forms, ways
from hf_polyspec.bench.measurements.batch_jobs import Job, on_device
from hf_polyspec.cli import app
from hf_polyspec.host import waiting


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Instead of loading a model, where it was to be loaded to."""
    found: list[Any] = []

    def load(name: str, dtype: str, device: Any = "nowhere") -> Any:
        found.append(str(device))
        return tiny("llama", vocab_size=259, max_position_embeddings=512)

    for room in (auto, forms):
        monkeypatch.setattr(room, "load_model", load)
    for room in (auto, ways):
        monkeypatch.setattr(room, "load_tokenizer", lambda name: byte_tokenizer())
    return found


def test_a_form_is_loaded_where_it_is_to_run(loaded: list[Any]) -> None:
    parser = ways.parser_of("batches", None, ())
    list(ways.targets_of(parser.parse_args(["--form", "float32", "float32+int8"])))
    assert loaded == ["cpu", "cpu"]
    given = parser.parse_args(["--form", "float32"])
    given.device = "elsewhere"
    list(ways.targets_of(given))
    assert loaded[2:] == ["elsewhere"]


def test_the_models_of_measure_auto_and_what_they_read(
    loaded: list[Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    waited: list[str] = []
    monkeypatch.setattr(auto, "wait_for", lambda device: waited.append(str(device)))
    monkeypatch.setattr(auto, "WAYS", {"alone": (True, [], {}), "auto": (False, ["suffix"], {})})
    auto.main(["--model", "tiny", "--device", "cpu", "--new-tokens", "4", "--turns", "1", "--what", "prompts"])
    assert loaded == ["cpu"]
    assert "tokens/s: alone" in capsys.readouterr().out
    assert waited == ["cpu"] * 2 * 2 * 2 * 2, "before and after, two texts, two ways, and a turn that warms"


def test_a_batch_goes_where_the_model_is() -> None:
    job = on_device(Job("unequal", "unequal", 2, dict(prompts(2))), torch.device("meta"))
    assert {one.device.type for one in job.inputs.values()} == {"meta"}


def test_work_on_an_accelerator_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[str] = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: waited.append(str(device)))
    waiting.wait_for("cuda:1")
    waiting.wait_for(torch.device("cpu"))
    assert waited == ["cuda:1"]


@pytest.mark.parametrize("name", ["batches", "auto", "joining"])
def test_a_device_that_is_not_there(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        app(["measure", name, "--device", "warp9"])
    assert ended.value.code == 2
    assert "argument --device: The device 'warp9' cannot be used" in capsys.readouterr().err


def test_a_threads_own_seconds_are_a_cpus(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        batches.main(["--one-thread", "--device", "meta"])
    assert "--one-thread counts the seconds of a CPU's thread" in capsys.readouterr().err
