# SPDX-License-Identifier: Apache-2.0
"""Batches of prompts of unequal length: `polyspec measure batches`.

For each size of batch, transformers' own loop over padded rows, the same model alone on rows of their own, and chains,
taking turns on the same prompts in one process. Prompts are pieces of this package's own sources, from 40 ids to 770;
answers are greedy and end with their text. Prints tokens a second (the reading of the prompts included), ratios to the
padded rows, and how many rows have the text that each of them gets alone.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from ...generation.doors import generate
from ...host.generation import pad_id
from . import arguments
from .ways import finish, in_turns, parser_of, table_of, target_of

LENGTHS = (40, 769, 90, 180, 300, 64, 120, 230)
"""Ids of the prompts, again and again; the first eight are 1793."""
PADDED = "generate(), padded rows"
ALONE = "the target alone, rows of their own"
CHAINS = ("suffix", "int8,suffix")


@dataclass(frozen=True)
class Rate:
    """One way of generating one batch.

    Attributes:
        way: `PADDED`, `ALONE` or the levels' names; batch: rows.
        tokens: emitted a generation; seconds: median.
        per_second: tokens a second; ratio: to `PADDED`.
        alike: rows whose text is the one that `PADDED` gives each of them alone.
    """

    way: str
    batch: int
    tokens: int
    seconds: float
    per_second: float
    ratio: float
    alike: int


def prompts(tokenizer: Any, batch: int, equal: bool = False) -> dict[str, torch.Tensor]:
    """`input_ids` and `attention_mask` `[B, L]`, padded on the left.

    Args:
        tokenizer: of the target; batch: rows; equal: whether all are one prompt of 230 ids.
    """
    sources = sorted(Path(__file__).resolve().parents[2].glob("*/*.py"), key=lambda path: -path.stat().st_size)
    lengths = [230 if equal else LENGTHS[row % len(LENGTHS)] for row in range(batch)]
    texts = [sources[0 if equal else 2 * row].read_text(encoding="utf-8") for row in range(batch)]
    rows = [tokenizer(text)["input_ids"][40 : 40 + length] for text, length in zip(texts, lengths, strict=True)]
    width = max(map(len, rows))
    ids = torch.zeros(batch, width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, own in enumerate(rows):
        ids[row, width - len(own) :], mask[row, width - len(own) :] = torch.tensor(own), 1
    return {"input_ids": ids, "attention_mask": mask}


def measure(
    target: Any,
    inputs: dict[str, torch.Tensor],
    chains: Sequence[str] = CHAINS,
    *,
    new_tokens: int = 64,
    rounds: int = 3,
) -> list[Rate]:
    """Time all ways of generating one batch, in turns.

    Args:
        target: as it is to run; inputs: ids and mask.
        chains: levels, their names with commas between; new_tokens: at most; rounds: of which the median counts.
    """
    ways: dict[str, list[Any] | None] = {PADDED: None, ALONE: []}
    ways |= {chain: chain.split(",") for chain in chains}
    texts: dict[str, torch.Tensor] = {}

    def timed(way: str, turn: int) -> float:
        started = time.perf_counter()
        texts[way] = _generated(target, inputs, ways[way], new_tokens)
        return time.perf_counter() - started

    seconds = in_turns(timed, list(ways), rounds)
    width, batch = inputs["input_ids"].shape[1], len(inputs["input_ids"])
    alone = [_alone(target, inputs, row, new_tokens) for row in range(batch)]
    pad = pad_id(target.generation_config)
    medians = {way: statistics.median(values) for way, values in seconds.items()}
    found = []
    for way in ways:
        answers = [_ended(row[width:].tolist(), target, pad) for row in texts[way]]
        tokens = sum(map(len, answers))
        alike = sum(one == other for one, other in zip(answers, alone, strict=True))
        ratio = medians[PADDED] / medians[way]
        found.append(Rate(way, batch, tokens, medians[way], tokens / medians[way], ratio, alike))
    return found


def _generated(target: Any, inputs: dict[str, torch.Tensor], levels: list[Any] | None, new: int) -> torch.Tensor:
    options = {**inputs, "max_new_tokens": new, "do_sample": False}
    text: torch.Tensor = (
        target.generate(**options) if levels is None else generate(target, assistant_models=levels, **options)
    )
    return text


def _alone(target: Any, inputs: dict[str, torch.Tensor], row: int, new: int) -> list[int]:
    real = inputs["attention_mask"][row].bool()
    own = {"input_ids": inputs["input_ids"][row : row + 1, real]}
    own["attention_mask"] = torch.ones_like(own["input_ids"])
    text = _generated(target, own, None, new)[0, own["input_ids"].shape[1] :].tolist()
    return _ended(text, target, None)


def _ended(answer: list[int], target: Any, pad: int | None) -> list[int]:
    """An answer up to and including the id that ends it."""
    ends = target.generation_config.eos_token_id
    ends = {ends} if isinstance(ends, int) else set(ends or ())
    end = next((place for place, token in enumerate(answer) if token in ends), len(answer) - 1)
    return answer[: end + 1]


def main(words: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = parser_of("batches", __doc__, CHAINS)
    parser.add_argument("--batch", nargs="+", type=arguments.count, default=[1, 2, 4, 8, 16])
    parser.add_argument("--equal", action="store_true", help="one prompt of 230 ids in every row")
    given = parser.parse_args(words)
    target, tokenizer = target_of(given)
    found: list[Rate] = []
    console = Console(width=110)
    for batch in given.batch:
        inputs = prompts(tokenizer, batch, given.equal)
        rates = measure(target, inputs, given.chain, new_tokens=given.new_tokens, rounds=given.rounds)
        real, columns = int(inputs["attention_mask"].sum()), inputs["attention_mask"].numel()
        title = f"batch {batch}: {real} ids of prompts, {columns} padded"
        table = table_of(title, ("tokens", "seconds", "tokens/s", "ratio", "as alone"))
        for rate in rates:
            table.add_row(
                rate.way, str(rate.tokens), f"{rate.seconds:.2f}", f"{rate.per_second:.0f}", f"{rate.ratio:.2f}",
                f"{rate.alike} of {rate.batch}",
            )  # fmt: skip
        console.print(table)
        found += rates
    finish(console, given, found)
