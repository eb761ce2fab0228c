# SPDX-License-Identifier: Apache-2.0
"""Arrangements that an earlier process has measured."""

from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
from transformers import PreTrainedModel

from hf_polyspec.generation.kept_placements import load, path_of, save
from hf_polyspec.generation.placements import Placed, Placing
from hf_polyspec.host.ranks import Ranks

WAYS = [("one", "one"), ("sharded", "one")]
PLACED = Placed(WAYS[1], {WAYS[0]: 0.5, WAYS[1]: 0.25})


def test_what_was_kept_is_found_by_its_key(
    target: PreTrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    save(path_of(target, ("int8", 1)), PLACED)
    assert load(path_of(target, ("int8", 1)), WAYS) == PLACED
    assert load(path_of(target, ("int8", 2)), WAYS) is None


def test_what_is_not_possible_now_is_measured_anew(tmp_path: Path) -> None:
    save(tmp_path / "kept.json", PLACED)
    assert load(tmp_path / "kept.json", WAYS[:1]) is None


@pytest.mark.parametrize(
    "text",
    [
        *("", "{", "[]", "{}", '{"places": 1, "seconds": {}}', '{"places": [], "seconds": 2}'),
        '{"places": ["one"], "seconds": {"one": 1' + 400 * "0" + "}}",
    ],
)
def test_a_damaged_file_is_none(tmp_path: Path, text: str) -> None:
    (tmp_path / "kept.json").write_text(text)
    assert load(tmp_path / "kept.json", WAYS) is None


def test_a_folder_that_cannot_be_written_to_is_a_line_in_the_log(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    with caplog.at_level(logging.WARNING):
        save(tmp_path / "file" / "kept.json", PLACED)
    assert "could not be kept" in caplog.text


@pytest.mark.parametrize("wanted", [[["one"]], [{"one": 1}], ["garbage"], "everywhere", 3])
def test_words_are_looked_at_before_anything_is_made(target: PreTrainedModel, wanted: object) -> None:
    with pytest.raises(ValueError, match="polyspec_placement must be one of"):
        Placing(target, ["int8"], wanted, (), cast("Ranks", SimpleNamespace(in_step=True)))
