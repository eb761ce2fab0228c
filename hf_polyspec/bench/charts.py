# SPDX-License-Identifier: Apache-2.0
"""Charts as inline SVG. Widths are percentages, so that a chart fits any page and its text keeps its size."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

_ROW, _BAR, _LABEL = 46, 16, 20
_COLUMNS_HEIGHT = 96


@dataclass(frozen=True)
class Bar:
    """One bar.

    Attributes:
        label: what it is of; text: its value in words.
        value: its length; interval: of the value, or None.
        kind: class of its colour.
    """

    label: str
    text: str
    value: float
    interval: tuple[float, float] | None
    kind: str


def bars(chosen: Sequence[Bar], title: str, reference: float = 1.0) -> str:
    """Horizontal bars with intervals, and a line at the reference.

    Args:
        chosen: what to draw.
        title: for readers who do not see it.
        reference: where the line is.
    """
    top = max([reference, *(bar.interval[1] if bar.interval else bar.value for bar in chosen)]) * 1.02
    height = _ROW * len(chosen) + 4
    parts = [_open(title, height)]
    for i, bar in enumerate(chosen):
        y = _ROW * i
        middle = y + _LABEL + _BAR / 2
        parts.append(f'<text x="0" y="{y + 14}" class="name">{escape(bar.label)}</text>')
        parts.append(f'<text x="100%" y="{y + 14}" class="value" text-anchor="end">{escape(bar.text)}</text>')
        width = _percent(bar.value / top)
        parts.append(f'<rect x="0" y="{y + _LABEL}" width="{width}" height="{_BAR}" rx="2" class="{bar.kind}"/>')
        if bar.interval is not None:
            low, high = (_percent(limit / top) for limit in bar.interval)
            parts.append(f'<line x1="{low}" x2="{high}" y1="{middle}" y2="{middle}" class="whisker"/>')
            for end in (low, high):
                parts.append(f'<line x1="{end}" x2="{end}" y1="{middle - 4}" y2="{middle + 4}" class="whisker"/>')
        place = _percent(reference / top)
        parts.append(
            f'<line x1="{place}" x2="{place}" y1="{y + _LABEL - 2}" y2="{y + _LABEL + _BAR + 2}" class="one"/>'
        )
    return "".join(parts) + "</svg>"


def histogram(counts: Sequence[int], title: str, level: int) -> str:
    """Columns: the share of checks that accepted exactly 0, 1, 2, ... tokens.

    Args:
        counts: checks by number of accepted tokens.
        title: for readers who do not see it.
        level: whose colour to use.
    """
    total = max(1, sum(counts))
    highest = max([1, *counts])
    step = 100 / max(1, len(counts))
    every = 1 if len(counts) <= 12 else 2 if len(counts) <= 24 else 5
    parts = [_open(title, _COLUMNS_HEIGHT + 34)]
    for i, count in enumerate(counts):
        height = _COLUMNS_HEIGHT * count / highest
        x, y = step * i, 14 + _COLUMNS_HEIGHT - height
        share = f"{count / total:.0%}"
        parts.append(
            f'<rect x="{x + step * 0.08:.2f}%" y="{y:.1f}" width="{step * 0.84:.2f}%" height="{height:.1f}" '
            f'class="level-{level}"><title>{i} accepted: {share} of {total} checks</title></rect>'
        )
        center = f"{x + step / 2:.2f}%"
        if i % every == 0:
            y_label = 14 + _COLUMNS_HEIGHT + 15
            parts.append(f'<text x="{center}" y="{y_label}" class="tick" text-anchor="middle">{i}</text>')
        if len(counts) <= 9 and count:
            parts.append(f'<text x="{center}" y="{y - 3:.1f}" class="tick" text-anchor="middle">{share}</text>')
    return "".join(parts) + "</svg>"


def stack(shares: Sequence[tuple[str, float, str]], title: str) -> str:
    """One bar parted into shares.

    Args:
        shares: name, share of the whole (0 to 1) and class of each part.
        title: for readers who do not see it.
    """
    parts = [_open(title, 26)]
    x = 0.0
    for name, share, kind in shares:
        hint = f"<title>{escape(name)}: {share:.1%}</title>"
        parts.append(
            f'<rect x="{_percent(x)}" y="2" width="{_percent(share)}" height="22" class="{kind}">{hint}</rect>'
        )
        if share >= 0.09:
            middle = _percent(x + share / 2)
            parts.append(f'<text x="{middle}" y="17" class="inside" text-anchor="middle">{share:.0%}</text>')
        x += share
    return "".join(parts) + "</svg>"


def _open(title: str, height: float) -> str:
    name = escape(title, quote=True)
    return f'<svg role="img" aria-label="{name}" width="100%" height="{height:g}">'


def _percent(share: float) -> str:
    return f"{100 * share:.2f}%"
