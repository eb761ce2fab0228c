# SPDX-License-Identifier: Apache-2.0
"""`polyspec measure server`: the same texts by generate() and of a server, which a client in another process asks."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
from tiny_checkpoints import save_pair

from hf_polyspec.bench.measurements.asking import Client
from hf_polyspec.bench.measurements.server import IN_PROCESS, STREAMED, WHOLE, in_a_thread, main, measure
from hf_polyspec.models.by_name import load_model, load_tokenizer


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return save_pair(tmp_path_factory.mktemp("models"))


def test_rates_are_of_the_texts_that_were_written(folders: tuple[Path, Path]) -> None:
    target, small = map(str, folders)
    model, tokenizer = load_model(target), load_tokenizer(target)
    rates = measure(model, tokenizer, f"{small},suffix", ["abc", "hello"], new_tokens=9, rounds=2)
    assert [rate.way for rate in rates] == [IN_PROCESS, WHOLE, STREAMED]
    for rate in rates:
        assert (rate.tokens, rate.texts) == (18, 2)
        assert rate.per_second * rate.seconds == pytest.approx(18)
        assert len(rate.ratios) == 2
        assert rate.ratio == pytest.approx(sum(rate.ratios) / 2)
    assert rates[0].ratios == [1.0, 1.0]
    # A stream withholds bytes that are half a character; random models write such ones.
    assert rates[1].alike == 2
    assert rates[0].first is rates[1].first is None
    assert rates[2].first is not None
    assert 0 < rates[2].first < rates[2].seconds


def test_what_computes_is_the_only_thread_that_has() -> None:
    found = in_a_thread(threading.current_thread)
    assert found is not threading.current_thread()
    assert not found.is_alive()


def test_a_client_that_fails_is_told(capfd: pytest.CaptureFixture[str]) -> None:
    """Its own traceback says why."""
    with Client() as client, pytest.raises(RuntimeError, match=r"the client's process ended with 1\."):
        client.ask("http://127.0.0.1:9/v1", "nothing", ["abc"], 1, stream=False)
    assert "APIConnectionError" in capfd.readouterr().err


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
