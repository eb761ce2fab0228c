# SPDX-License-Identifier: Apache-2.0
"""Draws `pictures/speed.svg` from the first table of `benchmarks.md`: `python docs/plots.py`, after it has changed."""

from __future__ import annotations

import re
from html import escape
from pathlib import Path

PAGE = Path(__file__).parent / "benchmarks.md"
PICTURE = Path(__file__).parent / "pictures" / "speed.svg"

_WIDTH, _LEFT, _RIGHT, _BAR, _GAP, _TOP = 760, 12, 64, 16, 14, 8
_COLOURS = ("0,114,178", "230,159,0", "0,158,115")
_VALUE = re.compile(r"([\d.]+)x \[([\d.]+), ([\d.]+)\]")
_STYLE = (
    "text{font:13px system-ui,sans-serif;fill:#222}.tick,.foot{font-size:12px;fill:#666}.grid{stroke:#ccc}"
    ".one{stroke:#666;stroke-dasharray:4 3}.whisker{stroke:#222;stroke-width:1.5}"
    + "".join(f".bar{i}{{fill:rgb({rgb})}}" for i, rgb in enumerate(_COLOURS))
    + "@media (prefers-color-scheme:dark){text{fill:#eee}.tick,.foot{fill:#aaa}.grid{stroke:#444}"
    ".one{stroke:#aaa}.whisker{stroke:#eee}}"
)


def first_table(page: str) -> list[list[str]]:
    """The cells of a page's first table, its head first."""
    lines = [line for line in re.split(r"\n\n", page[page.index("\n| ") + 1 :])[0].splitlines() if line]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return [rows[0], *rows[2:]]


def bars(table: list[list[str]]) -> str:
    """A table of speed-ups with intervals, `6.15x [5.56, 6.86]`, as bars: a group a row, a bar a column."""
    (caption, *columns), *rows = table
    values = [[tuple(map(float, _VALUE.fullmatch(cell).groups())) for cell in cells] for _, *cells in rows]  # type: ignore[union-attr]
    most = max(high for row in values for _, _, high in row)
    scale = (_WIDTH - _LEFT - _RIGHT) / most
    group = 20 + _BAR * len(columns) + _GAP
    bottom = _TOP + group * len(rows)
    parts = []
    for tick in range(int(most) + 1):
        x = _LEFT + tick * scale
        parts.append(_line(x, _TOP, x, bottom, "one" if tick == 1 else "grid"))
        parts.append(f'<text x="{x:.1f}" y="{bottom + 16}" class="tick" text-anchor="middle">{tick}x</text>')
    for i, (name, row) in enumerate(zip((row[0] for row in rows), values, strict=True)):
        top = _TOP + group * i
        parts.append(f'<text x="{_LEFT + 4}" y="{top + 14}">{escape(name.replace("`", ""))}</text>')
        for j, (value, low, high) in enumerate(row):
            y = top + 20 + _BAR * j
            parts.append(f'<rect x="{_LEFT}" y="{y}" width="{value * scale:.1f}" height="{_BAR - 2}" class="bar{j}"/>')
            ends = [_LEFT + end * scale for end in (low, high)]
            middle = y + (_BAR - 2) / 2
            parts.append(_line(ends[0], middle, ends[1], middle, "whisker"))
            parts.extend(_line(end, middle - 4, end, middle + 4, "whisker") for end in ends)
            parts.append(f'<text x="{ends[1] + 6:.1f}" y="{y + 12}" class="tick">{value:.2f}x</text>')
    x = float(_LEFT)
    for j, name in enumerate(columns):
        parts.append(f'<rect x="{x:.1f}" y="{bottom + 30}" width="14" height="14" class="bar{j}"/>')
        parts.append(f'<text x="{x + 20:.1f}" y="{bottom + 42}" class="foot">{escape(name)}</text>')
        x += 40 + 7 * len(name)
    said = caption.replace("`", "")
    parts.append(f'<text x="{_LEFT}" y="{bottom + 64}" class="foot">{escape(said)}; 95 % intervals</text>')
    height = bottom + 74
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" width="{_WIDTH}" height="{height}" '
        f'role="img" aria-label="{escape(said)}"><title>{escape(said)}</title><style>{_STYLE}</style>'
        f"{''.join(parts)}</svg>\n"
    )


def _line(x: float, y: float, to_x: float, to_y: float, kind: str) -> str:
    return f'<line x1="{x:.1f}" y1="{y:.1f}" x2="{to_x:.1f}" y2="{to_y:.1f}" class="{kind}"/>'


def drawn() -> str:
    """The picture of the page as it is."""
    return bars(first_table(PAGE.read_text(encoding="utf-8")))


if __name__ == "__main__":
    PICTURE.write_text(drawn(), encoding="utf-8")
