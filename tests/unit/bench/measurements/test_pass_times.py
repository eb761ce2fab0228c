# SPDX-License-Identifier: Apache-2.0
"""The table of pass times: forms are what they are called, and every number is a median of real passes."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_checkpoints import save_pair
from torch import nn

from hf_polyspec.bench.measurements import pass_times
from hf_polyspec.cli import app
from hf_polyspec.cpu.compiled import compiles
from hf_polyspec.quantization import Int4Linear, Int8Linear, is_packed

FORMS = ["float32", "bfloat16+pack", "float32+int8", "bfloat16+int8a8", "float32+int4"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_pair(tmp_path_factory.mktemp("passes"))[0])


def run(*words: str) -> None:
    app(["measure", "pass-times", *words], standalone_mode=False)


def test_every_form_is_timed_at_every_size(
    folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[list[Any]] = []
    plain = pass_times.pass_times

    def watching(models: list[Any], *rest: Any) -> Any:
        times = plain(models, *rest)
        seen.extend([models, times])
        return times

    monkeypatch.setattr(pass_times, "pass_times", watching)
    words = [word for form in FORMS for word in ("--form", form)]
    file = tmp_path / "times.json"
    sizes = ("--tokens", "1", "6", "--context", "9", "--rounds", "3")
    run("--model", folder, *words, *sizes, "--json", str(file))
    models, times = seen
    assert [model.dtype for model in models] == [getattr(torch, form.partition("+")[0]) for form in FORMS]
    assert [is_packed(model) for model in models] == [False, True, *3 * [compiles()]]
    kinds = [type(model.model.layers[0].mlp.up_proj) for model in models]
    assert kinds == [nn.Linear, nn.Linear, Int8Linear, Int8Linear, Int4Linear]
    assert models[3].model.layers[0].mlp.up_proj.activation_bits == 8
    kept = json.loads(file.read_text())
    written, shares = kept["milliseconds"], kept["shares"]
    assert list(written) == list(shares) == FORMS
    for i, form in enumerate(FORMS):
        assert written[form] == [1000 * statistics.median(of_size[i]) for of_size in times]
        assert all(len(of_size[i]) == 3 and min(of_size[i]) > 0 for of_size in times)
        assert shares[form] == [statistics.median(a / b for a, b in zip(of[i], of[0], strict=True)) for of in times]
    table = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["form", "1", "6"] in table
    numbers = (f"{time:.1f} {share:.2f}" for time, share in zip(written[FORMS[1]], shares[FORMS[1]], strict=True))
    assert [FORMS[1], *" ".join(numbers).split()] in table


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--form", "float31"), "float31"),
        (("--form", "float32+int3"), "after a dtype comes"),
        (("--tokens", "0"), "at least 1"),
    ],
)
def test_what_is_no_form_is_refused(
    words: tuple[str, ...], said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        run(*words)
    assert ended.value.code == 2
    assert said in capsys.readouterr().err
