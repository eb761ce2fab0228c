# SPDX-License-Identifier: Apache-2.0
"""Batches, alone and joining: `polyspec measure batches`.

For each batch, transformers' own loop over padded rows, the same model alone on rows of their own, and chains, taking
turns on the same prompts in one process. Prompts are pieces of this package's own sources, from 40 ids to 770 or all
alike, or one question of each task; answers are greedy (several texts of one prompt are sampled under one seed) and end
with their text. Then prompts that join an engine while others run. Prints tokens a second with the reading of the
prompts, ratios of one turn's seconds (their medians), and how many rows have the text that each of them gets alone; at
the end the bounds that this package sets itself, and which of them hold.

The whole takes a while; `--form`, `--prompts`, `--batch` and `--slots` cut it into pieces, and `--with` takes up what
earlier ones wrote with `--json`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from ...generation.doors import generate
from ...host.generation import BaseStreamer, pad_id
from ...host.waiting import wait_for
from . import arguments, joining
from .batch_bounds import bounds
from .batch_jobs import KINDS, Job, jobs, on_device, prompts
from .ways import finish, in_turns, parser_of, quotient, table_of, targets_of

PADDED = "generate(), padded rows"
ALONE = "the target alone, rows of their own"
CHAINS = ("auto", "suffix", "int8,suffix")


@dataclass(frozen=True)
class Rate:
    """One way of generating one batch.

    Attributes:
        form: of the target; prompts: their kind; name: of the batch; batch: rows.
        way: `PADDED`, `ALONE` or the levels' names.
        tokens: emitted a generation; seconds: median; first: until every row had its first token, median.
        per_second: tokens a second; ratio, to_alone: of speeds, to `PADDED` and to `ALONE`.
        decoding: ratio to `ALONE` behind the first tokens.
        alike: rows whose text is the one that `PADDED` gives each of them alone.
    """

    form: str
    prompts: str
    name: str
    batch: int
    way: str
    tokens: int
    seconds: float
    first: float
    per_second: float
    ratio: float
    to_alone: float
    decoding: float
    alike: int


class _Watch(BaseStreamer):
    """Notices when every row has its first token, on this clock."""

    asks_nobody = True

    def __init__(self, clock: Callable[[], float]) -> None:
        self.clock = clock
        self.seen = 0
        self.first = 0.0

    def put(self, value: torch.Tensor) -> None:
        self.seen += 1
        if self.seen == 2:  # the prompt comes first
            self.first = self.clock()

    def end(self) -> None:
        """Nothing is left to do."""


def measure(
    target: Any,
    job: Job,
    chains: Sequence[str] = CHAINS,
    *,
    form: str = "",
    new_tokens: int = 64,
    rounds: int = 3,
    clock: Callable[[], float] = time.perf_counter,
) -> list[Rate]:
    """Time all ways of generating one batch, in turns.

    Args:
        target: as it is to run; job: the batch; form: name of the target's.
        chains: levels, their names with commas between; new_tokens: at most; rounds: of which the median counts.
        clock: seconds from some moment on.
    """
    job = on_device(job, target.device)
    ways = {PADDED: None, ALONE: [], **{chain: chain.split(",") for chain in chains}}
    texts: dict[str, torch.Tensor] = {}
    first: dict[str, list[float]] = {way: [] for way in ways}

    def timed(way: str, turn: int) -> float:
        watch = _Watch(clock)
        wait_for(target.device)
        started = clock()
        texts[way] = generated(target, job.inputs, ways[way], new_tokens, streamer=watch, **job.options)
        wait_for(target.device)
        if turn >= 0:
            first[way].append(watch.first - started)
        return clock() - started

    whole = in_turns(timed, list(ways), rounds)
    behind = {way: [max(1e-9, a - b) for a, b in zip(whole[way], first[way], strict=True)] for way in ways}
    wanted = _own_texts(target, job, texts[PADDED], new_tokens)
    found = []
    for way in ways:
        answers = answers_of(target, job, texts[way])
        tokens = sum(map(len, answers))
        seconds = statistics.median(whole[way])
        alike = sum(one == other for one, other in zip(answers, wanted, strict=True))
        ratios = quotient(whole, way, PADDED), quotient(whole, way, ALONE), quotient(behind, way, ALONE)
        named = form, job.kind, job.name, job.rows, way
        found.append(Rate(*named, tokens, seconds, statistics.median(first[way]), tokens / seconds, *ratios, alike))
    return found


def generated(target: Any, inputs: dict[str, torch.Tensor], levels: Any, new: int, **options: Any) -> torch.Tensor:
    """Ids `[B, L + T]` under seed 0.

    Args:
        target: the model; inputs: ids and mask; levels: None for transformers' own loop; new: tokens at most.
        options: of `generate()`.
    """
    options = {**inputs, "max_new_tokens": new, **options}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        text: torch.Tensor = (
            target.generate(**options) if levels is None else generate(target, assistant_models=levels, **options)
        )
    return text


def _own_texts(target: Any, job: Job, padded: torch.Tensor, new: int) -> list[list[int]]:
    """The text of every row, alone where the row says what it is; sampled rows are those of the batch."""
    if job.options.get("do_sample"):
        return answers_of(target, job, padded)
    return [_alone(target, job.inputs, row, new) for row in range(job.rows)]


def answers_of(target: Any, job: Job, texts: torch.Tensor) -> list[list[int]]:
    """New ids of every row up to its end."""
    width, pad = job.inputs["input_ids"].shape[1], pad_id(target.generation_config)
    return [_ended(row[width:].tolist(), target, pad) for row in texts]


def _alone(target: Any, inputs: dict[str, torch.Tensor], row: int, new: int) -> list[int]:
    real = inputs["attention_mask"][row].bool()
    own = {"input_ids": inputs["input_ids"][row : row + 1, real]}
    own["attention_mask"] = torch.ones_like(own["input_ids"])
    text = generated(target, own, None, new, do_sample=False)[0, own["input_ids"].shape[1] :].tolist()
    return _ended(text, target, None)


def _ended(answer: list[int], target: Any, pad: int | None) -> list[int]:
    """An answer up to and including the id that ends it."""
    ends = target.generation_config.eos_token_id
    ends = {ends} if isinstance(ends, int) else set(ends or ())
    end = next((place for place, token in enumerate(answer) if token in ends), len(answer) - 1)
    return answer[: end + 1]


def _show(console: Console, title: str, rates: Sequence[Rate]) -> None:
    table = table_of(title, ("tokens", "seconds", "tokens/s", "to padded", "to alone", "decoding", "as alone"))
    for rate in rates:
        table.add_row(
            rate.way, str(rate.tokens), f"{rate.seconds:.2f}", f"{rate.per_second:.0f}", f"{rate.ratio:.2f}",
            f"{rate.to_alone:.2f}", f"{rate.decoding:.2f}", f"{rate.alike} of {rate.batch}",
        )  # fmt: skip
    console.print(table)


def _earlier(text: str) -> tuple[list[Rate], list[joining.Rate]]:
    """What `--json` wrote.

    Raises:
        ArgumentTypeError: there is no such file, or it is not one of these.
    """
    try:
        read = json.loads(Path(text).expanduser().read_text(encoding="utf-8"))
        return [Rate(**one) for one in read["rates"]], [joining.Rate(**one) for one in read["joining"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise argparse.ArgumentTypeError(f"{text} is no file that --json of this command wrote: {error}.") from error


def main(words: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = parser_of("batches", __doc__, CHAINS, ("bfloat16+pack", "bfloat16+int8"))
    parser.add_argument("--prompts", nargs="*", choices=KINDS, default=list(KINDS), help="which; all if left out")
    parser.add_argument("--batch", nargs="+", type=arguments.count, default=[1, 2, 4, 8, 16])
    parser.add_argument("--questions", help="Spec-Bench's question.jsonl, of which each task's first is asked")
    parser.add_argument("--slots", nargs="*", type=arguments.count, default=[8, 16], help="of engines; none for none")
    parser.add_argument("--joining", type=arguments.count, default=24, help="prompts that join")
    parser.add_argument("--with", nargs="+", type=_earlier, default=[], dest="earlier", help="files of earlier pieces")
    parser.add_argument(
        "--one-thread", action="store_true",
        help="compute with one thread and count its own seconds, which other work on the machine disturbs little",
    )  # fmt: skip
    given = parser.parse_args(words)
    if given.one_thread and torch.device(given.device).type != "cpu":
        parser.error("--one-thread counts the seconds of a CPU's thread, and others compute on --device.")
    clock = time.thread_time if given.one_thread else time.perf_counter
    if given.one_thread:
        torch.set_num_threads(1)
    found: list[Rate] = [rate for rates, _ in given.earlier for rate in rates]
    joined: list[joining.Rate] = [rate for _, rates in given.earlier for rate in rates]
    console = Console(width=120)
    for form, target, tokenizer in targets_of(given):
        for kind in given.prompts:
            for job in jobs(tokenizer, kind, given.batch, given.questions):
                options = {"new_tokens": given.new_tokens, "rounds": given.rounds, "clock": clock}
                rates = measure(target, job, given.chain, form=form, **options)
                _show(console, f"{form}, {job.title}", rates)
                found += rates
        if given.slots:
            rows = joining.rows_of(prompts(tokenizer, given.joining))
            new = joining.of_form(form, target, rows, given)
            joining.show(console, f"{form}, joining: {len(rows)} prompts, {sum(map(len, rows))} ids", new)
            joined += new
    table = table_of("bounds", ("at least", "found", ""))
    for bound in bounds(found, joined):
        table.add_row(bound.what, f"{bound.least:.2f}", bound.told, bound.verdict)
    console.print(table)
    finish(console, given, rates=found, joining=joined)
