# SPDX-License-Identifier: Apache-2.0
"""Answers read out of text."""

from __future__ import annotations

import pytest

from hf_polyspec.metrics.answers import (
    canonical_number,
    contains_answer,
    exact_match,
    final_number,
    marked_number,
    normalized,
    token_f1,
)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("1,000.00", "1000"),
        ("$72", "72"),
        ("-$3.50", "-3.5"),
        (".5", "0.5"),
        ("-0", "0"),
        ("100", "100"),
        ("007", "7"),
    ],
)
def test_canonical_number(text: str, number: str) -> None:
    assert canonical_number(text) == number


@pytest.mark.parametrize(
    ("text", "marked", "final"),
    [
        ("30 + 42 = <<30+42=72>>72\n#### 72", "72", "72"),
        ("#### 12\nQuestion: what is 5?\n#### 99", "12", "12"),
        ("#### $1,250.50 in total", "1250.5", "1250.5"),
        ("He earns $30 + $42 = $72.", None, "72"),
        ("That is 50% of 1,200, so 600.", None, "600"),
        ("the answer is -4", None, "-4"),
        ("2024.", None, "2024"),
        ("no number", None, None),
        ("", None, None),
    ],
)
def test_numbers_in_text(text: str, marked: str | None, final: str | None) -> None:
    assert marked_number(text) == marked
    assert final_number(text) == final


def test_squad_rules() -> None:
    assert normalized("The  Eiffel-Tower, a landmark!") == "eiffeltower landmark"
    assert exact_match("the Dean.", ["Irma", "dean"]) == 1.0
    assert exact_match("Dean in 2007", ["dean"]) == 0.0
    assert token_f1("the lowest since Dean", ["Dean", "lowest pressure since Dean"]) == pytest.approx(6 / 7)
    assert token_f1("something else", ["Dean"]) == 0.0
    assert token_f1("", ["Dean"]) == 0.0


def test_contained_answers_are_whole_words() -> None:
    assert contains_answer("It was 914 mbar (hPa), the lowest.", ["914 mbar ( hPa )"]) == 1.0
    assert contains_answer("It was 1914.", ["914"]) == 0.0
    assert contains_answer("anything", ["the"]) == 0.0  # nothing is left of this reference
