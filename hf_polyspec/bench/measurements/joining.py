# SPDX-License-Identifier: Apache-2.0
"""Prompts that join while others run: `polyspec measure joining`.

An engine writes greedy texts for many prompts of unequal length, so many at a time, once without drafts and once with
each chain, taking turns in one process. How long the reading of the prompts takes is timed in every turn by asking the
target alone for one token each, and taken off: what is left is decoding.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console

from ...engine.batch import generate_batch
from ...host.waiting import wait_for
from . import arguments
from .batch_jobs import prompts
from .ways import finish, in_turns, parser_of, quotient, table_of, targets_of

ALONE = "the target alone"
CHAINS = ("suffix",)


@dataclass(frozen=True)
class Rate:
    """One chain in an engine.

    Attributes:
        form: of the target; way: `ALONE` or the levels' names; slots: texts at a time.
        tokens: emitted; seconds: median, prompts included; reading: of it, for the prompts.
        per_second: tokens a second of decoding; ratio: to `ALONE`.
        alike: texts that are those of `ALONE`; texts: how many there are.
    """

    form: str
    way: str
    slots: int
    tokens: int
    seconds: float
    reading: float
    per_second: float
    ratio: float
    alike: int
    texts: int


def measure(
    target: Any,
    rows: Sequence[list[int]],
    slots: int,
    chains: Sequence[str],
    *,
    form: str = "",
    new_tokens: int,
    rounds: int,
) -> list[Rate]:
    """Time an engine without drafts and with each chain, in turns.

    Args:
        target: as it is to run; rows: ids of the prompts; slots: texts at a time; form: name of the target's.
        chains: levels, their names with commas between; new_tokens: at most; rounds: of which the median counts.
    """
    ways: dict[str, Any] = {ALONE: [], **{chain: chain.split(",") for chain in chains}}
    texts: dict[str, list[list[int]]] = {}
    reading: dict[int, float] = {}

    def timed(way: str, turn: int) -> float:
        if turn not in reading:
            reading[turn] = _timed(target, rows, slots, [], 1)[0]
        seconds, texts[way] = _timed(target, rows, slots, ways[way], new_tokens)
        return max(1e-9, seconds - reading[turn])

    decoding = in_turns(timed, list(ways), rounds, warms=False)
    read = statistics.median(reading.values())
    found: list[Rate] = []
    for way in ways:
        answers = texts[way]
        tokens, seconds = sum(map(len, answers)), statistics.median(decoding[way])
        alike = sum(one == other for one, other in zip(answers, texts[ALONE], strict=True))
        per_second, ratio = (tokens - len(rows)) / seconds, quotient(decoding, way, ALONE)
        found.append(Rate(form, way, slots, tokens, seconds + read, read, per_second, ratio, alike, len(rows)))
    return found


def _timed(
    target: Any, rows: Sequence[list[int]], slots: int, levels: Any, new_tokens: int
) -> tuple[float, list[list[int]]]:
    wait_for(target.device)
    started = time.perf_counter()
    found = generate_batch(
        target, rows, assistant_models=levels, slots=slots, max_new_tokens=new_tokens, do_sample=False
    )
    wait_for(target.device)
    seconds = time.perf_counter() - started
    failed = next((answer.exception for answer in found.values() if answer.exception is not None), None)
    if failed is not None:
        raise failed
    return seconds, [answer.generated_tokens for answer in found.values()]


def rows_of(inputs: dict[str, torch.Tensor]) -> list[list[int]]:
    """The ids of each row without its padding."""
    return [ids[mask.bool()].tolist() for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True)]


def of_form(form: str, target: Any, rows: Sequence[list[int]], given: argparse.Namespace) -> list[Rate]:
    """Every number of slots, on one form of the target."""
    for levels in ([], *(chain.split(",") for chain in given.chain)):
        _timed(target, rows[:2], 2, levels, 4)  # kernels and copies are made
    return [
        rate
        for slots in given.slots
        for rate in measure(
            target, rows, slots, given.chain, form=form, new_tokens=given.new_tokens, rounds=given.rounds
        )
    ]


def show(console: Console, title: str, rates: Sequence[Rate]) -> None:
    """Print a table."""
    table = table_of(title, ("slots", "tokens", "seconds", "reading", "decoded/s", "ratio", "as alone"))
    for rate in rates:
        table.add_row(
            rate.way, str(rate.slots), str(rate.tokens), f"{rate.seconds:.2f}", f"{rate.reading:.2f}",
            f"{rate.per_second:.0f}", f"{rate.ratio:.2f}", f"{rate.alike} of {rate.texts}",
        )  # fmt: skip
    console.print(table)


def main(words: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = parser_of("joining", __doc__, CHAINS)
    parser.add_argument("--slots", nargs="+", type=arguments.count, default=[8, 16])
    parser.add_argument("--prompts", type=arguments.count, default=24)
    given = parser.parse_args(words)
    console = Console(width=110)
    found: list[Rate] = []
    for form, target, tokenizer in targets_of(given):
        rows = rows_of(prompts(tokenizer, given.prompts))
        rates = of_form(form, target, rows, given)
        show(console, f"{form}, {len(rows)} prompts, {sum(map(len, rows))} ids", rates)
        found += rates
    finish(console, given, rates=found)
