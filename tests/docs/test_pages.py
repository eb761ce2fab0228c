# SPDX-License-Identifier: Apache-2.0
"""Pages as they are read: formulas are set, lines of code fit a laptop, every page has its place in the site."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest
from markdown_it import MarkdownIt

ROOT = Path(__file__).parents[2]
PAGES = sorted((ROOT / "docs").glob("*.md"))
LONGEST = 96
"""Characters of a line of code that a window of 1280 pixels shows beside the navigation."""
_BLOCK = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("page", [ROOT / "README.md", *PAGES], ids=lambda page: page.name)
def test_no_line_of_code_has_to_be_scrolled(page: Path) -> None:
    parts = MarkdownIt().parse(page.read_text())
    blocks = [
        part.content for part in parts if part.type == "code_block" or (part.type == "fence" and part.info != "math")
    ]
    assert [line for block in blocks for line in block.splitlines() if len(line) > LONGEST] == []


def test_the_plot_shows_the_numbers_of_the_page() -> None:
    found = importlib.util.spec_from_file_location("plots", ROOT / "docs" / "plots.py")
    assert found is not None
    assert found.loader is not None
    plots = importlib.util.module_from_spec(found)
    found.loader.exec_module(plots)
    assert plots.PICTURE.read_text(encoding="utf-8") == plots.drawn(), "python docs/plots.py draws it anew"
    assert "6.15x" in plots.drawn()


def test_the_site_is_built_with_every_page_and_its_formulas(site: Path) -> None:
    for page in PAGES:
        built = site / ("index.html" if page.stem == "index" else f"{page.stem}/index.html")
        text = built.read_text()
        blocks = _BLOCK.finditer(page.read_text())
        assert text.count('class="formula"><math') == sum(found[1] == "math" for found in blocks), page.name
    home = (site / "index.html").read_text()
    assert all(page.stem == "index" or f'href="{page.stem}/"' in home for page in PAGES), "a page is not in the menu"
