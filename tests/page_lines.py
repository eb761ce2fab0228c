# SPDX-License-Identifier: Apache-2.0
"""What the pages tell a reader to type: blocks of code, and the commands in them as a shell reads them."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from pathlib import Path

from markdown_it import MarkdownIt

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(page: Path, language: str) -> list[str]:
    """The fenced blocks of one language."""
    tokens = MarkdownIt().parse(page.read_text(encoding="utf-8"))
    return [token.content for token in tokens if token.type == "fence" and token.info.strip() == language]


def indented(page: Path) -> list[str]:
    """The code blocks without a fence."""
    tokens = MarkdownIt().parse(page.read_text(encoding="utf-8"))
    return [token.content for token in tokens if token.type == "code_block"]


def lines(block: str) -> Iterator[list[str]]:
    """The words of each line as a shell reads it: it goes on after a backslash, and while a quote is open."""
    line = ""
    for part in block.replace("\\\n", " ").splitlines():
        line += part
        try:
            yield shlex.split(line, comments=True)
        except ValueError:
            line += "\n"
        else:
            line = ""
    assert not line, f"a quote stays open: {line}"


def commands(program: str) -> list[tuple[Path, list[str]]]:
    """What the pages have a program do: the page, and the words behind the program's name."""
    return [
        (page, words[1:])
        for page in PAGES
        for block in blocks(page, "bash")
        for words in lines(block)
        if words[:1] == [program]
    ]
