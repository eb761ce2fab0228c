# SPDX-License-Identifier: Apache-2.0
"""What happened in a generation, to look at: a table for terminals and notebooks, and the text coloured by level."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from html import escape
from typing import Any, Protocol

from rich import box
from rich.table import Table

from .counters import LevelStats

MAX_GROUP = 8
"""Tokens that may wait for the rest of a character; valid UTF-8 needs at most four bytes."""

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
_CONTEXT = 6

# Okabe and Ito's palette, which colour-blind readers can tell apart; translucent, so that text stays in the page's
# own colour and readable on light and dark backgrounds alike.
_COLOURS = ("213,94,0", "86,180,233", "0,158,115", "230,159,0", "204,121,167", "0,114,178")
_OPACITY = 0.38
LEVEL_COLOURS = _COLOURS
"""Red, green and blue of each level, repeated from the seventh on."""

_HEADINGS = (
    ("level", "level"),
    ("passes", "passes"),
    ("seconds", "seconds"),
    ("drafted", "drafted"),
    ("accept-\ned", "accepted"),
    ("recov-\nered", "recovered"),
    ("bonus", "bonus"),
    ("accept.\nrate", "acceptance rate"),
    ("expec-\nted", "expected acceptance rate"),
    ("mean\nlength", "mean acceptance length"),
)


class Counted(Protocol):
    """What is shown of a call; `PolySpecStats` says what it means."""

    @property
    def levels(self) -> list[LevelStats]:
        """One per member of the chain, the target first."""
        ...

    @property
    def token_levels(self) -> list[list[int]]:
        """Per row, the level that first proposed each emitted token."""
        ...

    @property
    def new_tokens(self) -> int:
        """Emitted tokens, all rows together."""
        ...

    @property
    def seconds(self) -> float:
        """Of the call."""
        ...

    @property
    def tokens_per_second(self) -> float:
        """Of the call."""
        ...


def stats_table(stats: Counted) -> Table:
    """One line per level: what it drafted, kept and drew, and how long it took.

    Args:
        stats: of one `generate()` call.

    Returns:
        A table that fits into 80 columns.
    """
    table = Table(box=box.SIMPLE_HEAD, padding=0, show_edge=False, caption=_summary(stats), caption_justify="left")
    for i, (short, _) in enumerate(_HEADINGS):
        if i == 0:
            table.add_column(short, overflow="fold", min_width=8)
        else:
            table.add_column(short, justify="right", no_wrap=True)
    for level in stats.levels:
        name, *cells = _cells(level)
        # Names come from folders and hub ids; square brackets in them are no markup.
        table.add_row(name.replace("[", r"\["), *cells)
    return table


def stats_html(stats: Counted) -> str:
    """The table of `stats_table` as an HTML fragment for notebooks."""
    head = "".join(f"<th>{name}</th>" for _, name in _HEADINGS)
    rows = "".join(
        "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in _cells(level)) + "</tr>" for level in stats.levels
    )
    caption = f"<caption>{escape(_summary(stats))}</caption>"
    return f"<table>{caption}<thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"


def tokens_html(stats: Counted, tokenizer: Any, sequences: Any, prompt_length: int = 0) -> str:
    """Generated text with each token coloured by the level that first proposed it.

    Tokens that hold only part of a character share one span, in the colour of the first of them. Padding in front
    of a prompt and behind a finished row is left out.

    Args:
        stats: of the call that generated the text.
        tokenizer: turns ids into text.
        sequences: `[B, L]` ids as `generate()` returned them, a tensor or lists.
        prompt_length: columns of `sequences` that are prompt.

    Returns:
        A self-contained HTML fragment.

    Raises:
        ValueError: the sequences and the statistics are not of the same call.
    """
    rows = _as_rows(sequences)
    _check_fit(stats, rows, prompt_length)
    parts = [_STYLE, '<div class="polyspec-view">', _legend(stats)]
    for number, (ids, levels) in enumerate(zip(rows, stats.token_levels, strict=True)):
        if len(rows) > 1:
            parts.append(f'<div class="polyspec-name">row {number}</div>')
        text = _row_html(stats, tokenizer, ids, levels, prompt_length)
        parts.append(f'<div class="polyspec-text" dir="auto">{text}</div>')
    parts.append("</div>")
    return "".join(parts)


def token_pieces(
    tokenizer: Any, ids: Sequence[int], levels: Sequence[int], prompt_length: int = 0
) -> list[tuple[int, str]]:
    """Generated text in pieces, each with the level that first proposed it.

    Args:
        tokenizer: turns ids into text.
        ids: of one row, prompt and generated tokens.
        levels: one per generated token, as in `PolySpecStats.token_levels`.
        prompt_length: how many of the ids are prompt.

    Returns:
        Pairs of a level and a text; neighbours of one level are one piece, tokens of one character are not parted.
    """
    listed = [int(token) for token in ids][: prompt_length + len(levels)]
    pieces: list[tuple[int, str]] = []
    for first, _, text in _pieces(tokenizer, listed, 0, prompt_length):
        level = levels[first - prompt_length]
        if pieces and pieces[-1][0] == level:
            text = pieces.pop()[1] + text
        pieces.append((level, text))
    return pieces


def whole_pieces(stats: Counted, tokenizer: Any, sequences: Any, prompt_length: int = 0) -> list[tuple[int, str]]:
    """The text that the first row generated in whole characters, each with the number of its first token.

    Args:
        stats, tokenizer, sequences, prompt_length: as for `tokens_html`.

    Raises:
        ValueError: the sequences and the statistics are not of the same call.
    """
    rows = _as_rows(sequences)
    _check_fit(stats, rows, prompt_length)
    ids = rows[0][: prompt_length + len(stats.token_levels[0])]
    start = _first_real(tokenizer, ids, prompt_length)
    return [(first - prompt_length, text) for first, _, text in _pieces(tokenizer, ids, start, prompt_length)]


def html_page(fragments: Sequence[tuple[str, str]], title: str) -> str:
    """A page of its own around HTML fragments, following the reader's light or dark setting.

    Args:
        fragments: pairs of a heading and a fragment.
        title: of the page.
    """
    sections = "".join(f"<h2>{escape(heading)}</h2>{fragment}" for heading, fragment in fragments)
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width"><meta name="color-scheme" content="light dark">'
        f"<title>{escape(title)}</title><style>:root{{color-scheme:light dark}}"
        "body{font-family:system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem}"
        "table{border-collapse:collapse;font-size:.85rem}th,td{padding:.2rem .4rem;text-align:right}"
        "th:first-child,td:first-child{text-align:left;overflow-wrap:anywhere;min-width:8rem}caption{text-align:left;opacity:.75}</style></head>"
        f"<body><h1>{escape(title)}</h1>{sections}</body></html>\n"
    )


def _cells(level: LevelStats) -> list[str]:
    return [
        f"{level.index} {level.name}",
        str(level.forward_passes),
        f"{level.seconds:.2f}",
        str(level.drafted),
        str(level.accepted),
        str(level.recovered),
        str(level.bonus),
        _number(level.acceptance_rate, ".1%"),
        _number(level.expected_acceptance_rate, ".1%"),
        _number(level.mean_acceptance_length, ".2f"),
    ]


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _summary(stats: Counted) -> str:
    text = f"{stats.new_tokens} tokens in {stats.seconds:.2f} s, {stats.tokens_per_second:.1f} tokens/s"
    chosen = getattr(stats, "chosen", None)
    return text if chosen is None else f"{text}\nauto: {chosen}"


def _as_rows(sequences: Any) -> list[list[int]]:
    listed = sequences.tolist() if hasattr(sequences, "tolist") else list(sequences)
    if listed and not isinstance(listed[0], (list, tuple)) and not hasattr(listed[0], "tolist"):
        listed = [listed]
    return [[int(token) for token in row] for row in listed]


def _check_fit(stats: Counted, rows: list[list[int]], prompt_length: int) -> None:
    if len(rows) != len(stats.token_levels):
        raise ValueError(f"sequences has {len(rows)} row(s), but the statistics are of {len(stats.token_levels)}.")
    for number, (ids, levels) in enumerate(zip(rows, stats.token_levels, strict=True)):
        if not 0 <= prompt_length <= len(ids) or len(levels) > len(ids) - prompt_length:
            raise ValueError(
                f"row {number} of sequences has {len(ids)} tokens, too few for a prompt of {prompt_length} and "
                f"{len(levels)} generated tokens; pass the sequences and prompt_length of the same generate() call."
            )


def _legend(stats: Counted) -> str:
    proposed = [level for row in stats.token_levels for level in row]
    items = []
    for level in stats.levels:
        count = proposed.count(level.index)
        share = f"{count} of {len(proposed)} tokens" + (f", {count / len(proposed):.0%}" if proposed else "")
        role = "target" if level.index == 0 else f"level {level.index}"
        items.append(f'<span class="polyspec-{_slot(level.index)}">{escape(level.name)}</span> ({role}: {share})')
    return f'<div class="polyspec-name">first proposed by: {" &nbsp; ".join(items)}</div>'


def _row_html(stats: Counted, tokenizer: Any, ids: list[int], levels: list[int], prompt_length: int) -> str:
    names = {level.index: level.name for level in stats.levels}
    start = _first_real(tokenizer, ids, prompt_length)
    parts = []
    if start < prompt_length:
        prompt = _decode(tokenizer, ids[start:prompt_length])
        parts.append(f'<span class="polyspec-prompt">{escape(prompt)}</span>')
    end = prompt_length + len(levels)
    for first, last, text in _pieces(tokenizer, ids[:end], start, prompt_length):
        group = levels[first - prompt_length : last - prompt_length]
        hint = ", ".join(f"{ids[first + i]} by {names.get(level, level)}" for i, level in enumerate(group))
        parts.append(f'<span class="polyspec-{_slot(group[0])}" title="{escape(hint)}">{escape(text)}</span>')
    return "".join(parts)


def _pieces(tokenizer: Any, ids: list[int], start: int, begin: int) -> Iterator[tuple[int, int, str]]:
    """Group tokens from `begin` on into whole characters; yields first token, token after the last, and their text.

    A token's text depends on its neighbours (spaces, bytes of one character), so it is what the decoded text gains
    by it, with a few tokens before it for context.
    """
    first = begin
    for last in range(begin + 1, len(ids) + 1):
        context = max(start, first - _CONTEXT)
        before = _decode(tokenizer, ids[context:first])
        text = _decode(tokenizer, ids[context:last])[len(before) :]
        if text.endswith(_REPLACEMENT) and last < len(ids) and last - first < MAX_GROUP:
            continue
        yield first, last, text
        first = last


def _first_real(tokenizer: Any, ids: list[int], prompt_length: int) -> int:
    """Where a left-padded prompt begins."""
    pad = getattr(tokenizer, "pad_token_id", None)
    start = 0
    while start < prompt_length and ids[start] == pad:
        start += 1
    return start


def _decode(tokenizer: Any, ids: list[int]) -> str:
    if not ids:
        return ""
    return str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))


def _slot(level: int) -> int:
    return level % len(_COLOURS)


def _style() -> str:
    colours = "".join(
        f".polyspec-view .polyspec-{i}{{background:rgba({rgb},{_OPACITY});border-bottom:2px solid rgb({rgb})}}"
        for i, rgb in enumerate(_COLOURS)
    )
    return (
        "<style>.polyspec-view{color:inherit;line-height:1.7;margin:.5rem 0}"
        ".polyspec-view .polyspec-text{white-space:pre-wrap;overflow-wrap:anywhere;margin:.3rem 0 .8rem}"
        ".polyspec-view .polyspec-name{font-size:.85em}"
        ".polyspec-view .polyspec-prompt{opacity:.65}"
        ".polyspec-view span[class^=polyspec-]{color:inherit;border-radius:2px}"
        f"{colours}</style>"
    )


_STYLE = _style()
