# SPDX-License-Identifier: Apache-2.0
"""A generation as a picture: one line for each pass of the target, tokens coloured by the level that guessed them."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

from .display import LEVEL_COLOURS, Counted, whole_pieces

WIDTH = 760
"""Of the picture, in pixels; it may be shown at any size."""

_LINE, _CHARACTER, _LABEL, _PAD, _SIZE = 30, 7.85, 92, 5, 13
_FONT = "ui-monospace,SFMono-Regular,Menlo,Consolas,monospace"


def passes(levels: Sequence[int]) -> list[int]:
    """How many of the tokens of a row each pass of the target gave, the last of them being its own.

    Args:
        levels: as `PolySpecStats.token_levels` has them for a row; 0 is a token that the target drew itself, with which
            every pass ends but one that is cut off by the end of the text.
    """
    found, count = [], 0
    for level in levels:
        count += 1
        if level == 0:
            found.append(count)
            count = 0
    return [*found, count] if count else found


def picture(stats: Counted, tokenizer: Any, sequences: Any, prompt_length: int = 0, *, lines: int = 12) -> str:
    """The first row of a generation as SVG.

    Args:
        stats: of the call that generated the text; tokenizer: turns ids into text.
        sequences: `[B, L]` ids as `generate()` returned them, a tensor or lists.
        prompt_length: columns of `sequences` that are prompt.
        lines: passes shown at most, from the first on; one that does not fit a line takes several.

    Returns:
        An SVG document that follows the reader's light or dark setting.

    Raises:
        ValueError: the sequences and the statistics are not of the same call, or no row was generated.
    """
    pieces = whole_pieces(stats, tokenizer, sequences, prompt_length)
    levels = stats.token_levels[0]
    counts = passes(levels)
    boxes: list[str] = []
    place = row = 0
    for count in counts[:lines]:
        end, x = place + count, float(_LABEL)
        word = "token" if count == 1 else "tokens"
        boxes.append(_text(0, row, f"{count} {word}", "label"))
        while pieces and pieces[0][0] < end:
            first, text = pieces.pop(0)
            shown = _visible(text)
            width = max(1, len(shown)) * _CHARACTER + _PAD
            if x + width > WIDTH:
                x, row = float(_LABEL), row + 1
            boxes.append(_box(x, row, width, levels[first], shown))
            x += width + 2
        place, row = end, row + 1
    more = max(0, len(counts) - lines)
    caption = f"{len(levels)} tokens in {len(counts)} passes of the target" + (f", {more} not shown" if more else "")
    return _document(stats, "".join(boxes), row, caption)


def _visible(text: str) -> str:
    text = text.replace("\n", "⏎").replace("\t", "⇥")
    return text.strip(" ") or "␣"


def _text(x: float, row: int, text: str, kind: str) -> str:
    y = row * _LINE + 19
    return f'<text x="{x:g}" y="{y}" class="{kind}" xml:space="preserve">{escape(text)}</text>'


def _box(x: float, row: int, width: float, level: int, text: str) -> str:
    rect = f'<rect x="{x:.1f}" y="{row * _LINE + 3}" width="{width:.1f}" height="24" rx="3" '
    return rect + f'class="level{level % len(LEVEL_COLOURS)}"/>' + _text(round(x + _PAD / 2, 1), row, text, "token")


def _document(stats: Counted, boxes: str, rows: int, caption: str) -> str:
    used = sorted({level for row in stats.token_levels[:1] for level in row})
    names = {level.index: level.name for level in stats.levels}
    legend, x = "", 0.0
    for level in used:
        name = f"by {names.get(level, level)}" + (" itself" if level == 0 else "")
        y = rows * _LINE + 14
        legend += f'<rect x="{x:.1f}" y="{y}" width="14" height="14" rx="3" class="level{level % len(LEVEL_COLOURS)}"/>'
        legend += f'<text x="{x + 20:.1f}" y="{y + 12}" class="label">{escape(name)}</text>'
        x += 20 + (len(name) + 2) * _CHARACTER * 0.92
    legend += f'<text x="0" y="{rows * _LINE + 50}" class="label">{escape(caption)}</text>'
    height = rows * _LINE + 58
    colours = "".join(
        f".level{i}{{fill:rgba({rgb},.3);stroke:rgb({rgb});stroke-width:1}}" for i, rgb in enumerate(LEVEL_COLOURS)
    )
    style = (
        f"text{{font:{_SIZE}px {_FONT};fill:#222}}.label{{font-size:12px;fill:#666}}{colours}"
        "@media (prefers-color-scheme:dark){text{fill:#eee}.label{fill:#aaa}}"
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" '
        f'role="img" aria-label="{escape(caption)}"><title>{escape(caption)}</title><style>{style}</style>'
        f"{boxes}{legend}</svg>\n"
    )
