# SPDX-License-Identifier: Apache-2.0
"""Pages as they are read: formulas are set, lines of code fit a laptop, every page has its place in the site."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = sorted((ROOT / "docs").glob("*.md"))
LONGEST = 96
"""Characters of a line of code that a window of 1280 pixels shows beside the navigation."""
_BLOCK = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("page", [ROOT / "README.md", *PAGES], ids=lambda page: page.name)
def test_no_line_of_code_has_to_be_scrolled(page: Path) -> None:
    blocks = [found[2] for found in _BLOCK.finditer(page.read_text()) if found[1] != "math"]
    assert [line for block in blocks for line in block.splitlines() if len(line) > LONGEST] == []


def test_the_site_is_built_with_every_page_and_its_formulas(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for page in PAGES:
        built = tmp_path / ("index.html" if page.stem == "index" else f"{page.stem}/index.html")
        text = built.read_text()
        blocks = _BLOCK.finditer(page.read_text())
        assert text.count('class="formula"><math') == sum(found[1] == "math" for found in blocks), page.name
    home = (tmp_path / "index.html").read_text()
    assert all(page.stem == "index" or f'href="{page.stem}/"' in home for page in PAGES), "a page is not in the menu"
