# SPDX-License-Identifier: Apache-2.0
"""Question files: what is read, refused, drawn and batched."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hf_polyspec.bench.questions import MT_BENCH, Question, make_groups, read_questions, select


def write(path: Path, *lines: object) -> str:
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    return str(path)


def question(number: int, task: str = "qa", turns: int = 1) -> Question:
    return Question(str(number), task, task, ("What now?",) * turns, ())


def test_categories_become_tasks_and_nested_references_are_flattened(tmp_path: Path) -> None:
    entries = [{"question_id": i, "category": c, "turns": ["a", "b"]} for i, c in enumerate(MT_BENCH)]
    rag = {"question_id": 99, "category": "rag", "turns": ["c"], "reference": [["one", "two"], "three"]}
    own = {"question_id": 100, "category": "my own", "turns": ["d"]}
    found, digest = read_questions(write(tmp_path / "q.jsonl", *entries, "", rag, own))
    assert [one.task for one in found] == ["mt_bench"] * 8 + ["rag", "my own"]
    assert found[8].references == ("one", "two", "three")
    assert len(digest) == 64
    assert list(select(found, None, None, 0)) == ["mt_bench", "rag", "my own"]


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("{", "line 2: not JSON"),
        ([1], "line 2: a question is a JSON object, not list"),
        ({"question_id": 2, "category": "qa"}, "line 2: the field 'turns' is missing"),
        ({"question_id": 2, "category": "qa", "turns": [" "]}, "line 2: turns must be a list of texts"),
        ({"question_id": 1, "category": "qa", "turns": ["x"]}, "line 2: the question_id 1 occurs twice"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: object, sentence: str) -> None:
    good = {"question_id": 1, "category": "qa", "turns": ["What?"]}
    with pytest.raises(ValueError, match=sentence):
        read_questions(write(tmp_path / "q.jsonl", good, line))


def test_lines_end_at_newlines_alone(tmp_path: Path) -> None:
    """Other separators of Unicode stand unescaped in the JSON of many data sets."""
    fields = {"question_id": 1, "category": "qa", "turns": ["One\u2028two\u0085three"]}
    path = tmp_path / "q.jsonl"
    path.write_bytes((json.dumps(fields, ensure_ascii=False) + "\r\n").encode())
    assert [one.turns for one in read_questions(str(path))[0]] == [("One\u2028two\u0085three",)]


def test_missing_files_tasks_and_limits_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no question file"):
        read_questions(str(tmp_path / "none.jsonl"))
    with pytest.raises(ValueError, match="holds no questions"):
        read_questions(write(tmp_path / "empty.jsonl"))
    with pytest.raises(ValueError, match=r"--tasks names 'maths'.*there are qa"):
        select([question(1)], ["maths"], None, 0)
    with pytest.raises(ValueError, match="--limit must be at least 1"):
        select([question(1)], None, 0, 0)


def test_the_draw_depends_on_the_seed_and_on_no_other_task() -> None:
    questions = [question(i, task) for task in ("qa", "rag") for i in range(40)]
    both = select(questions, None, 10, 3)
    assert [len(found) for found in both.values()] == [10, 10]
    assert select(questions, ["rag"], 10, 3)["rag"] == both["rag"]
    assert select(questions, None, 10, 4) != both
    order = [int(one.question_id) for one in both["qa"]]
    assert order == sorted(order)


def test_batches_are_full_of_one_kind_and_count_each_question_once() -> None:
    chosen = {"mt_bench": [question(i, "mt_bench", 2) for i in range(5)], "qa": [question(i + 50) for i in range(2)]}
    groups = make_groups(chosen, 4)
    assert [group.name for group in groups] == ["0+1+2+3", "50+51+50+51", "4+0+1+2"]
    assert [group.own for group in groups] == [4, 2, 1]
    counted = [one.question_id for group in groups for one in group.questions[: group.own]]
    assert sorted(counted) == sorted(one.question_id for found in chosen.values() for one in found)
    assert all(len({len(one.turns) for one in group.questions}) == 1 for group in groups)
