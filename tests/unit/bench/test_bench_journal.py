# SPDX-License-Identifier: Apache-2.0
"""The folder of a run after a kill, and its settings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from hf_polyspec.bench.journal import Journal, read_lines, write_settings


def line(group: str, row: int = 0, own: int = 1) -> dict[str, Any]:
    return {"method": "plain", "temperature": 0.0, "group": group, "turn": 0, "row": row, "own": own}


def test_a_torn_line_is_dropped_and_what_is_written_next_stands_alone(tmp_path: Path) -> None:
    journal = Journal(tmp_path, "records")
    journal.open()
    journal.append([line("a")])
    journal.append([line("b")])
    whole = journal.path.read_bytes()
    journal.path.write_bytes(whole[:-7])
    assert [found["group"] for found in read_lines(tmp_path, "records")] == ["a"]
    again = Journal(tmp_path, "records")
    assert [found["group"] for found in again.open()] == ["a"]
    again.append([line("b")])
    assert journal.path.read_bytes() == whole


def test_a_line_that_is_whole_but_for_its_end_is_torn_too(tmp_path: Path) -> None:
    journal = Journal(tmp_path, "records")
    journal.open()
    journal.append([line("a")])
    journal.path.write_bytes(journal.path.read_bytes()[:-1])
    assert journal.open() == []


def test_a_batch_that_is_not_whole_is_done_again(tmp_path: Path) -> None:
    journal = Journal(tmp_path, "records")
    journal.open()
    journal.append([line("a+b", 0, 2), line("a+b", 1, 2)])
    journal.append([line("c+d", 0, 2)])
    assert [(found["group"], found["row"]) for found in journal.open()] == [("a+b", 0), ("a+b", 1)]


def test_the_lines_of_several_processes_are_one_run(tmp_path: Path) -> None:
    for rank, group in enumerate("ab"):
        journal = Journal(tmp_path, "records", rank)
        journal.open()
        journal.append([line(group)])
    assert [found["group"] for found in read_lines(tmp_path, "records")] == ["a", "b"]


def test_a_broken_line_in_the_middle_is_named(tmp_path: Path) -> None:
    (tmp_path / "records-0.jsonl").write_text('{"a": 1}\n{"a": \n{"a": 1}\n')
    with pytest.raises(ValueError, match=r"records-0\.jsonl is damaged .line 2 is not what was written"):
        read_lines(tmp_path, "records")


def test_settings_that_differ_are_refused_by_name(tmp_path: Path) -> None:
    write_settings(tmp_path, {"--seed": 0, "--tasks": ["qa"]})
    write_settings(tmp_path, {"--seed": 0, "--tasks": ("qa",)})
    with pytest.raises(ValueError, match="was made with --seed = 0, and this one has 1"):
        write_settings(tmp_path, {"--seed": 1, "--tasks": ["qa"]})
    with pytest.raises(ValueError, match=r'--tasks = \["qa"\], and this one has \["qa", "rag"\]'):
        write_settings(tmp_path, {"--seed": 0, "--tasks": ["qa", "rag"]})
