# SPDX-License-Identifier: Apache-2.0
"""Prompts that join while others run: `polyspec measure joining`.

An engine writes greedy texts for many prompts of unequal length, so many at a time, once without drafts and once with
each chain, taking turns in one process. How long the reading of the prompts takes is timed by asking for one token
each, and taken off: what is left is decoding.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console

from ...engine.batch import generate_batch
from . import arguments
from .batches import prompts
from .ways import finish, in_turns, parser_of, table_of, target_of

ALONE = "the target alone"
CHAINS = ("suffix",)


@dataclass(frozen=True)
class Rate:
    """One chain in an engine.

    Attributes:
        way: `ALONE` or the levels' names; slots: texts at a time.
        tokens: emitted; seconds: median, prompts included; reading: of it, for the prompts.
        per_second: tokens a second of decoding; ratio: to `ALONE`.
        alike: texts that are those of `ALONE`; texts: how many there are.
    """

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
    target: Any, rows: Sequence[list[int]], slots: int, chains: Sequence[str], *, new_tokens: int, rounds: int
) -> list[Rate]:
    """Time an engine without drafts and with each chain, in turns.

    Args:
        target: as it is to run; rows: ids of the prompts; slots: texts at a time.
        chains: levels, their names with commas between; new_tokens: at most; rounds: of which the median counts.
    """
    ways: dict[str, list[Any]] = {ALONE: [], **{chain: chain.split(",") for chain in chains}}
    texts: dict[str, list[list[int]]] = {}
    reading: dict[str, list[float]] = {way: [] for way in ways}

    def timed(way: str, turn: int) -> float:
        reading[way].append(_timed(target, rows, slots, ways[way], 1)[0])
        seconds, texts[way] = _timed(target, rows, slots, ways[way], new_tokens)
        return seconds

    whole = in_turns(timed, list(ways), rounds, warms=False)
    found: list[Rate] = []
    for way in ways:
        answers = texts[way]
        tokens, total, read = sum(map(len, answers)), statistics.median(whole[way]), statistics.median(reading[way])
        per_second = (tokens - len(rows)) / max(1e-9, total - read)
        alike = sum(one == other for one, other in zip(answers, texts[ALONE], strict=True))
        ratio = per_second / found[0].per_second if found else 1.0
        found.append(Rate(way, slots, tokens, total, read, per_second, ratio, alike, len(rows)))
    return found


def _timed(
    target: Any, rows: Sequence[list[int]], slots: int, levels: list[Any], new_tokens: int
) -> tuple[float, list[list[int]]]:
    started = time.perf_counter()
    found = generate_batch(
        target, rows, assistant_models=levels, slots=slots, max_new_tokens=new_tokens, do_sample=False
    )
    seconds = time.perf_counter() - started
    failed = next((answer.exception for answer in found.values() if answer.exception is not None), None)
    if failed is not None:
        raise failed
    return seconds, [answer.generated_tokens for answer in found.values()]


def main(words: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = parser_of("joining", __doc__, CHAINS)
    parser.add_argument("--slots", nargs="+", type=arguments.count, default=[8, 16])
    parser.add_argument("--prompts", type=arguments.count, default=24)
    given = parser.parse_args(words)
    target, tokenizer = target_of(given)
    inputs = prompts(tokenizer, given.prompts)
    rows = [ids[mask.bool()].tolist() for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True)]
    _timed(target, rows[:2], 2, [], 4)  # kernels are compiled
    found: list[Rate] = []
    for slots in given.slots:
        found += measure(target, rows, slots, given.chain, new_tokens=given.new_tokens, rounds=given.rounds)
    title = f"{len(rows)} prompts, {sum(map(len, rows))} ids"
    table = table_of(title, ("slots", "tokens", "seconds", "reading", "decoded/s", "ratio", "as alone"))
    for rate in found:
        table.add_row(
            rate.way, str(rate.slots), str(rate.tokens), f"{rate.seconds:.2f}", f"{rate.reading:.2f}",
            f"{rate.per_second:.0f}", f"{rate.ratio:.2f}", f"{rate.alike} of {rate.texts}",
        )  # fmt: skip
    console = Console(width=110)
    console.print(table)
    finish(console, given, found)
