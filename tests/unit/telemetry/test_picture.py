# SPDX-License-Identifier: Apache-2.0
"""The picture of a generation: a line for each pass of the target, whole characters, the colours of the levels."""

from __future__ import annotations

import re
from typing import Any
from xml.etree import ElementTree

import pytest

from hf_polyspec.telemetry.counters import LevelStats
from hf_polyspec.telemetry.picture import WIDTH, passes, picture
from hf_polyspec.telemetry.stats import PolySpecStats

SVG = "{http://www.w3.org/2000/svg}"


class Letters:
    """A tokenizer with a letter an id."""

    pad_token_id = None

    def decode(self, ids: list[int], **_options: Any) -> str:
        return "".join(chr(97 + token) for token in ids)


def stats(*levels: int) -> PolySpecStats:
    return PolySpecStats([LevelStats("large", 0), LevelStats("<small>", 1)], [list(levels)], len(levels), 1.0)


def drawn(found: str) -> list[tuple[str, str, float]]:
    """Per token box its colour, text and height."""
    root = ElementTree.fromstring(found)
    texts = [t for t in root.findall(f"{SVG}text") if t.get("class") == "token"]
    boxes = [r for r in root.findall(f"{SVG}rect") if r.get("height") == "24"]
    return [(b.get("class"), t.text, float(b.get("y"))) for b, t in zip(boxes, texts, strict=True)]


@pytest.mark.parametrize(
    ("levels", "expected"), [([0], [1]), ([1, 1, 0, 0, 1], [3, 1, 1]), ([], []), ([0, 1, 0], [1, 2])]
)
def test_a_pass_ends_with_the_token_that_the_target_drew(levels: list[int], expected: list[int]) -> None:
    assert passes(levels) == expected


def test_each_pass_has_its_line_and_each_token_its_colour() -> None:
    found = picture(stats(1, 1, 0, 0, 1, 0), Letters(), [[9, 0, 1, 2, 3, 4, 5]], 1)
    assert [(kind, text) for kind, text, _ in drawn(found)] == [
        ("level1", "a"), ("level1", "b"), ("level0", "c"), ("level0", "d"), ("level1", "e"), ("level0", "f"),
    ]  # fmt: skip
    heights = [height for _, _, height in drawn(found)]
    assert heights == sorted(heights)
    assert len(set(heights)) == 3
    assert "6 tokens in 3 passes of the target" in found
    assert "&lt;small&gt;" in found
    texts = ElementTree.fromstring(found).findall(f"{SVG}text")
    labels = [each.text for each in texts if each.get("class") == "label"]
    assert labels[:3] == ["3 tokens", "1 token", "2 tokens"]
    assert labels[3:5] == ["by large itself", "by <small>"]
    height = float(ElementTree.fromstring(found).get("viewBox", "").split()[-1])
    assert max(float(each.get("y", 0)) for each in texts) < height < 200


def test_spaces_and_ends_of_lines_can_be_seen() -> None:
    class Spaces(Letters):
        def decode(self, ids: list[int], **_options: Any) -> str:
            return "".join(["\n", "\t", " ", " a "][token] for token in ids)

    found = picture(stats(0, 0, 0, 0), Spaces(), [[0, 1, 2, 3]])
    assert [text for _, text, _ in drawn(found)] == ["⏎", "⇥", "␣", "a"]


def test_a_long_pass_takes_several_lines_and_only_some_passes_are_shown() -> None:
    levels = [*[1] * 80, 0, *[0] * 5]
    found = picture(stats(*levels), Letters(), [[token % 26 for token in range(len(levels))]], lines=2)
    assert len(drawn(found)) == 82
    assert len({height for _, _, height in drawn(found)}) > 2
    assert "86 tokens in 6 passes of the target, 4 not shown" in found
    assert all(
        float(x) + float(w) <= WIDTH for x, w in re.findall(r'rect x="([\d.]+)" y="\d+" width="([\d.]+)"', found)
    )


def test_texts_of_another_call_are_refused() -> None:
    with pytest.raises(ValueError, match="too few for a prompt of 1"):
        picture(stats(1, 0), Letters(), [[0, 1]], 1)
