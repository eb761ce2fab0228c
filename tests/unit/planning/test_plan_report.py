# SPDX-License-Identifier: Apache-2.0
"""The table of a plan on terminals of any width."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from hf_polyspec.planning.report import _MEASURED, _NUMBERS, CandidatesTable, _Row

LONG = "SmolLM2-135M-Instruct-GPTQ-Int8-g128"
NUMBERS = ("12.34", "1234.5", "1.23x", "1198.7", "-12.9 %", "+13.0 %")
ROWS = (
    _Row("*", f"{LONG} + suffix", "block 16, tree 63, depth 7, top 10, direct 24", NUMBERS),
    _Row("", "a [bold]name + suffix", "draft 4", ("1.00", "999.9", "1.00x", "", "", "")),
)


def shown(width: int) -> str:
    console = Console(file=io.StringIO(), width=width, force_terminal=False)
    console.print(CandidatesTable(ROWS, _NUMBERS + _MEASURED))
    return console.file.getvalue()  # type: ignore[attr-defined,no-any-return]


@pytest.mark.parametrize("width", [60, 80, 100, 200])
def test_everything_can_be_read_and_nothing_is_wider_than_the_terminal(width: int) -> None:
    text = shown(width)
    assert max(map(len, text.splitlines())) <= width
    assert "…" not in text
    words = [*NUMBERS, *ROWS[1].numbers[:3], LONG, "[bold]name", "suffix", "depth 7,", "direct", "draft 4"]
    headings = [part for heading in _NUMBERS + _MEASURED for part in heading.split("\n")]
    for word in [*words, *headings, "chain", "sizes", "*"]:
        assert word in text, word


def test_a_line_a_candidate_where_that_fits() -> None:
    line = next(line for line in shown(200).splitlines() if LONG in line)
    assert all(cell in line for cell in (*NUMBERS, ROWS[0].sizes))
    narrow = shown(80).splitlines()
    above = next(i for i, line in enumerate(narrow) if LONG in line)
    assert any(all(cell in line for cell in NUMBERS) for line in narrow[above + 1 : above + 3])
