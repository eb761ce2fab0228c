# SPDX-License-Identifier: Apache-2.0
"""Prompts from files and from the target, and which are kept."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from hf_polyspec.eagle.training.prompts import (
    PromptFilter,
    chat_frame,
    prompt_ids,
    read_excluded,
    read_prompts,
    sample_random,
    whole_sentences,
)

USER = [{"role": "user", "content": "How?"}]


def test_frame_of_a_chat_template(chat_tokenizer: PreTrainedTokenizerFast) -> None:
    frame = chat_frame(chat_tokenizer)
    assert (frame.header, frame.closing) == ((1, 3), 2)
    words = chat_tokenizer.encode("w1 w2", add_special_tokens=False)
    turns = [{"role": "user", "content": "w1 w2"}]
    assert prompt_ids(chat_tokenizer, turns) == [1, 3, *words, 2, 4]


@pytest.mark.parametrize(
    "row",
    [
        "How?",
        {"prompt": "How?"},
        {"instruction": "How?"},
        {"question": "How?"},
        {"text": "How?"},
        {"turns": ["How?", "And then?"]},
        {"messages": [*USER, {"role": "assistant", "content": "So."}]},
        {"conversations": [{"from": "human", "value": "How?"}, {"from": "gpt", "value": "So."}]},
    ],
)
def test_kinds_of_entries(tmp_path: Path, row: Any) -> None:
    lines, whole = tmp_path / "a.jsonl", tmp_path / "a.json"
    lines.write_text(json.dumps(row) + "\n\n")
    whole.write_text(json.dumps([row]))
    assert read_prompts(lines) == read_prompts(whole) == [USER]


def test_lines_end_at_newlines_alone(tmp_path: Path) -> None:
    """Other separators of Unicode stand unescaped in the JSON of many data sets."""
    path, text = tmp_path / "a.jsonl", "One\u2028two\u0085three"
    path.write_bytes((json.dumps({"prompt": text}, ensure_ascii=False) + "\r\n").encode())
    assert read_prompts(path) == [[{"role": "user", "content": text}]]


def test_several_turns_end_before_the_last_answer(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    turns = [*USER, {"role": "assistant", "content": "So."}, {"role": "user", "content": "Why?"}]
    path.write_text(json.dumps({"messages": [*turns, {"role": "assistant", "content": "Because."}]}))
    assert read_prompts(path) == [turns]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"id": 3}\n', "entry 1 of .* holds no prompt"),
        ("a.jsonl", '{"messages": [{"role": "assistant", "content": "So."}]}', "holds only answers"),
        ("a.txt", "\n \n", "holds no prompt"),
        ("a.jsonl", '"How?"\n{"prompt": \n', r"line 2 of .*a\.jsonl is not JSON \(Expecting value\)"),
        ("a.jsonl", '"  "\n', "entry 1 of .* holds no prompt"),
        ("a.jsonl", '{"turns": [" "]}\n', "entry 1 of .* holds no prompt"),
        ("a.jsonl", '{"messages": ["How?"]}\n', "entry 1 of .* holds a message that is no role with a text"),
        ("a.jsonl", '{"messages": [{"role": "user", "content": null}]}\n', "a message that is no role with a text"),
        ("a.json", '["How?"', r"a\.json is not JSON"),
        ("a.json", '{"prompt": "How?"}', "must hold a list of prompts, not dict"),
    ],
)
def test_unreadable_files_are_refused(tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        read_prompts(tmp_path / name)
    with pytest.raises(ValueError, match="no file of prompts"):
        read_prompts(tmp_path / "absent.txt")


def test_filter() -> None:
    keep = PromptFilter(min_words=3, max_tokens=10, ascii_ratio=0.9, excluded=frozenset({"what is this ?"}))
    assert keep.accepts("Tell me more", 3)
    assert not keep.accepts("tell  ME more", 3), "a duplicate but for case and spaces"
    assert not keep.accepts("Too short", 2)
    assert not keep.accepts("Far too many ids", 11)
    assert not keep.accepts("Что это такое значит", 5)
    assert not keep.accepts("What is THIS ?", 4)
    assert keep.accepts("What is that ?", 4)


def test_excluded_prompts_include_every_turn(tmp_path: Path) -> None:
    row = {"turns": ["First  Question", "Second question"]}
    lines, whole = tmp_path / "bench.jsonl", tmp_path / "bench.json"
    lines.write_text(json.dumps(row) + "\n")
    whole.write_text(json.dumps([row]))
    assert read_excluded(lines) == read_excluded(whole) == {"first question", "second question"}
    lines.write_text(json.dumps({"prompt": "Third question", "turns": None}))
    assert read_excluded(lines) == {"third question"}
    system = {"role": "system", "content": "You help."}
    lines.write_text(json.dumps({"messages": [system, *USER, {"role": "assistant", "content": "So."}]}))
    assert read_excluded(lines) == {"how?"}
    assert read_excluded(None) == frozenset()


def test_whole_sentences() -> None:
    assert whole_sentences("One. Two? And thr") == "One. Two?"
    assert whole_sentences("No end") == ""
    assert whole_sentences("A line.\nAnother li") == "A line."


def test_random_numbers_depend_on_sample_and_stage_alone() -> None:
    first = [sample_random(0, 7, "answer").random() for _ in range(2)]
    assert first[0] == first[1]
    others = [sample_random(1, 7, "answer"), sample_random(0, 8, "answer"), sample_random(0, 7, "prompt")]
    assert len({first[0], *(dice.random() for dice in others)}) == 4
