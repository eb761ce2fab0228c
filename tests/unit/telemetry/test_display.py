# SPDX-License-Identifier: Apache-2.0
"""The table and the coloured text: every number and every character in its place."""

from __future__ import annotations

import html
import pickle
import re
from html.parser import HTMLParser
from io import StringIO

import pytest
import torch
from rich.console import Console
from tiny_checkpoints import byte_tokenizer

import hf_polyspec
from hf_polyspec import telemetry
from hf_polyspec.telemetry.counters import LevelStats
from hf_polyspec.telemetry.display import html_page, stats_html, stats_table, tokens_html
from hf_polyspec.telemetry.stats import PolySpecStats


def make_stats(token_levels: list[list[int]], names: tuple[str, ...] = ("big", "mid", "suffix")) -> PolySpecStats:
    levels = [LevelStats(name, i) for i, name in enumerate(names)]
    return PolySpecStats(levels, token_levels, sum(map(len, token_levels)), 2.0)


class Reader(HTMLParser):
    """Collects the text of each span inside a text block, with its class; fails on tags that do not match."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[tuple[str, str]] = []
        self.spans: list[tuple[str, str]] = []
        self.blocks = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.open.append((tag, dict(attrs).get("class") or ""))
        self.blocks += self.open[-1][1] == "polyspec-text"

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop()[0] == tag

    def handle_data(self, data: str) -> None:
        if len(self.open) > 1 and self.open[-2][1] == "polyspec-text":
            self.spans.append((self.open[-1][1].removeprefix("polyspec-"), data))


def read(fragment: str) -> Reader:
    reader = Reader()
    reader.feed(fragment)
    reader.close()
    assert reader.open == []
    return reader


def test_each_token_has_the_colour_of_its_level_and_the_prompt_none() -> None:
    tokenizer = byte_tokenizer()
    prompt, answer = tokenizer.encode("ask: "), tokenizer.encode("yes!")
    stats = make_stats([[2, 1, 0, 2]])
    reader = read(tokens_html(stats, tokenizer, torch.tensor([prompt + answer]), len(prompt)))
    assert reader.spans == [("prompt", "ask: "), ("2", "y"), ("1", "e"), ("0", "s"), ("2", "!")]


def test_bytes_of_one_character_share_a_span_in_the_colour_of_the_first() -> None:
    tokenizer = byte_tokenizer()
    ids = tokenizer.encode("aé漢🙂b")
    assert len(ids) == 1 + 2 + 3 + 4 + 1
    stats = make_stats([[0, 2, 1, 1, 0, 0, 2, 0, 0, 0, 1]])
    reader = read(tokens_html(stats, tokenizer, [ids]))
    assert reader.spans == [("0", "a"), ("2", "é"), ("1", "漢"), ("2", "🙂"), ("1", "b")]


def test_a_character_cut_off_at_the_end_is_still_shown() -> None:
    tokenizer = byte_tokenizer()
    ids = tokenizer.encode("a🙂")[:-1]
    reader = read(tokens_html(make_stats([[0, 1, 1, 1]]), tokenizer, [ids]))
    assert [kind for kind, _ in reader.spans] == ["0", "1"]
    assert "\ufffd" in reader.spans[1][1]


def test_bytes_that_are_never_a_character_do_not_swallow_the_text() -> None:
    tokenizer = byte_tokenizer()
    broken = tokenizer.encode("🙂")[:1]
    ids = broken * 30 + tokenizer.encode("ok")
    reader = read(tokens_html(make_stats([[1] * 30 + [0, 0]]), tokenizer, [ids]))
    assert len(reader.spans) > 3
    assert reader.spans[-1] == ("0", "k")
    assert "".join(text for _, text in reader.spans) == tokenizer.decode(ids)


def test_markup_in_text_and_names_is_escaped() -> None:
    tokenizer = byte_tokenizer()
    text = "<script>alert('1')</script> & \"q\""
    ids = tokenizer.encode(text)
    stats = make_stats([[1] * len(ids)], names=("<b>x</b>", 'a"b'))
    fragment = tokens_html(stats, tokenizer, [tokenizer.encode("<i>") + ids], 3)
    assert "<script" not in fragment
    assert "<b>" not in fragment
    assert "<i>" not in fragment
    reader = read(fragment)
    assert "".join(data for kind, data in reader.spans if kind == "1") == text
    assert 'by a"b"' not in fragment
    assert "<b>" not in stats_html(stats)


def test_rows_of_a_batch_leave_out_padding_at_both_ends() -> None:
    tokenizer = byte_tokenizer()
    pad = tokenizer.pad_token_id
    rows = [
        [pad, pad, *tokenizer.encode("hi"), *tokenizer.encode("abcd")],
        [*tokenizer.encode("hola"), *tokenizer.encode("z"), 2, pad, pad],
    ]
    reader = read(tokens_html(make_stats([[0, 1, 1, 2], [2, 0]]), tokenizer, torch.tensor(rows), 4))
    assert reader.blocks == 2
    assert reader.spans == [
        ("prompt", "hi"), ("0", "a"), ("1", "b"), ("1", "c"), ("2", "d"),
        ("prompt", "hola"), ("2", "z"), ("0", "</s>"),
    ]  # fmt: skip


def test_legend_names_every_level_with_its_share() -> None:
    tokenizer = byte_tokenizer()
    fragment = tokens_html(make_stats([[0, 1, 1, 2]]), tokenizer, [tokenizer.encode("abcd")])
    legend = html.unescape(re.sub(r"<[^>]*>", "", re.sub(r"<style>.*?</style>", "", fragment)))
    assert "big (target: 1 of 4 tokens, 25%)" in legend
    assert "mid (level 1: 2 of 4 tokens, 50%)" in legend
    assert "suffix (level 2: 1 of 4 tokens, 25%)" in legend


def test_an_empty_answer_is_no_error() -> None:
    tokenizer = byte_tokenizer()
    reader = read(tokens_html(make_stats([[]]), tokenizer, [tokenizer.encode("ask")], 3))
    assert reader.spans == [("prompt", "ask")]


@pytest.mark.parametrize(
    ("sequences", "prompt_length", "said"),
    [([[3, 4], [3, 4]], 0, "2 row"), ([[3, 4, 5]], 2, "too few"), ([[3, 4]], 9, "too few"), ([[3, 4]], -1, "too few")],
)
def test_sequences_of_another_call_are_refused(sequences: list[list[int]], prompt_length: int, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        tokens_html(make_stats([[0, 1]]), byte_tokenizer(), sequences, prompt_length)


def test_colours_leave_the_text_in_the_page_s_own_colour() -> None:
    fragment = tokens_html(make_stats([[0]]), byte_tokenizer(), [[5]])
    assert "color:inherit" in fragment
    # Opaque backgrounds would be unreadable on one of light and dark.
    assert not re.search(r"background:\s*(#|rgb\()", fragment)


def filled() -> PolySpecStats:
    target, drafter = LevelStats("a-very-long-model-name-[bold]/with-folder", 0), LevelStats("suffix", 1)
    for drafted, accepted in ((4, 4), (4, 1), (3, 3)):
        target.record_round(drafted, accepted)
    target.record_overlap(torch.tensor(5.5), 11)
    target.forward_passes, target.seconds = 12345, 1234.56
    drafter.drafted, drafter.accepted = 11, 8
    return PolySpecStats([target, drafter], [[0, 1]], 2, 4.0)


def test_table_shows_every_counter_within_80_columns() -> None:
    console = Console(file=StringIO(), width=80, color_system=None)
    console.print(stats_table(filled()))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert max(map(len, text.splitlines())) <= 80
    first = next(line for line in text.splitlines() if "12345" in line).split()
    assert first[-9:] == ["12345", "1234.56", "11", "8", "1", "2", "72.7%", "50.0%", "3.67"]
    second = next(line for line in text.splitlines() if "suffix" in line).split()
    assert second[2:] == ["0", "0.00", "11", "8", "0", "0", "72.7%", "-", "-"]
    # A long name is folded, and its brackets are no markup.
    folded = "".join(line.split()[0] for line in text.splitlines() if line.strip())
    assert "a-very-long-model-name-[bold]/with-folder" in folded
    assert "2 tokens in 4.00 s, 0.5 tokens/s" in text


def test_a_notebook_shows_the_table() -> None:
    shown = filled()._repr_html_()
    cells = re.findall(r"<td>(.*?)</td>", shown)
    assert cells[1:10] == ["12345", "1234.56", "11", "8", "1", "2", "72.7%", "50.0%", "3.67"]
    assert len(re.findall("<th>", shown)) == len(cells) // 2 == 10


def test_page_is_whole_and_escapes_its_titles() -> None:
    page = html_page([("a & b", "<p>x</p>")], "t<")
    assert page.startswith("<!doctype html>")
    assert "<h2>a &amp; b</h2><p>x</p>" in page
    assert "<title>t&lt;</title>" in page
    assert 'charset="utf-8"' in page


def test_statistics_are_one_class_by_whatever_name_and_survive_a_pickle() -> None:
    assert hf_polyspec.PolySpecStats is telemetry.PolySpecStats is PolySpecStats
    assert hf_polyspec.LevelStats is telemetry.LevelStats is LevelStats
    stats = make_stats([[2, 1, 0]])
    again = pickle.loads(pickle.dumps(stats))
    assert type(again) is PolySpecStats
    assert again == stats
    # Where the class stood when the counters and what is shown of them were one file.
    older = pickle.dumps(stats, protocol=0).replace(b"hf_polyspec.telemetry.stats", b"hf_polyspec.telemetry")
    assert pickle.loads(older) == stats
