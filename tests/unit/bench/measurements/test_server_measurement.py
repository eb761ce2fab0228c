# SPDX-License-Identifier: Apache-2.0
"""`polyspec measure server`: the same texts asked for in process and of a server in another one."""

from __future__ import annotations

import io
import subprocess
from pathlib import Path
from typing import Any

import pytest
from tiny_checkpoints import save_pair

from hf_polyspec.bench.measurements.server import IN_PROCESS, STREAMED, WHOLE, Served, main, measure
from hf_polyspec.integrations.server import ChainServer
from hf_polyspec.models.by_name import load_model, load_tokenizer


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return save_pair(tmp_path_factory.mktemp("models"))


def test_rates_are_of_the_texts_that_were_written(folders: tuple[Path, Path]) -> None:
    target, small = map(str, folders)
    model, tokenizer = load_model(target), load_tokenizer(target)
    with ChainServer(model, tokenizer, "suffix", name="measured", port=0) as door:
        url = f"http://127.0.0.1:{door.port}/v1"
        rates = measure(model, tokenizer, f"{small},suffix", ["abc", "hello"], url, new_tokens=9, rounds=1)
    assert [rate.way for rate in rates] == [IN_PROCESS, WHOLE, STREAMED]
    for rate in rates:
        assert (rate.tokens, rate.texts) == (18, 2)
        assert rate.per_second * rate.seconds == pytest.approx(18)
        assert rate.ratio == pytest.approx(rates[0].seconds / rate.seconds)  # of one round
    # A stream withholds bytes that are half a character; random models write such ones.
    assert rates[1].alike == 2


def test_a_server_that_cannot_begin_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    class Ended:
        def __init__(self, words: list[str], **_: Any) -> None:
            self.stderr = io.StringIO(f"loading\npolyspec: there is no folder {words[4]}.\n")

        def wait(self) -> int:
            return 2

    monkeypatch.setattr(subprocess, "Popen", Ended)
    with pytest.raises(RuntimeError, match=r"the server ended with 2: .*there is no folder nothing-here\."):
        Served(["nothing-here"])


def test_the_command_serves_what_it_runs_itself(folders: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    target, small = map(str, folders)
    main(["--model", target, "--form", "float32", "--chain", small, "--new-tokens", "4",
          "--prompts", "1", "--rounds", "1"])  # fmt: skip
    said = capsys.readouterr().out
    assert all(way in said for way in (IN_PROCESS, WHOLE, STREAMED))
    assert "1 of 1" in said


def test_a_form_that_is_not_served_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--form", "bfloat16+int8"])
    assert "a server's model is as it is or packed, not int8" in capsys.readouterr().err
