# SPDX-License-Identifier: Apache-2.0
"""What it costs to check a draft once the logits are there: `polyspec measure checks`.

Greedy; sampled under shared noise, which draws for every step what plain generate() draws for it; and that draw alone.
A sampled check should cost no more than a greedy one and the draw.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence

import torch

from ...exactness.context import Context, Prompt
from ...exactness.distributions import LawMaker
from ...exactness.judgement import judge
from ...exactness.noise import SharedNoise
from ...exactness.proposal import Proposal
from ...models.environment import describe
from . import arguments

CPU = torch.device("cpu")


def check_times(width: int, vocabulary: int, repeats: int) -> dict[str, float]:
    """Medians of interleaved runs, in seconds.

    Args:
        width: tokens of the draft, all of which are kept; vocabulary: ids; repeats: runs of each.

    Returns:
        "greedy", "sampled" and "draw".
    """
    dice = torch.Generator().manual_seed(0)
    logits = 4 * torch.randn(1, width + 1, vocabulary, generator=dice)
    context = Context([[1, 2, 3]], Prompt(3, None, torch.arange(3)[None]))

    def law(sampled: bool) -> LawMaker:
        noise = SharedNoise([torch.Generator().manual_seed(1)], 1, vocabulary) if sampled else None
        return LawMaker([], sampled, CPU, noise=noise)

    def check(sampled: bool, draft: list[int]) -> list[int]:
        offered = Proposal([draft], None, [[1] * len(draft)])
        return judge(law(sampled), context, offered, logits, [True], "auto", 0).tokens[0]

    def right(sampled: bool) -> list[int]:
        draft: list[int] = []
        while len(draft) < width:
            draft = check(sampled, [*draft, *[0] * (width - len(draft))])[:width]
        return draft

    def draw() -> None:
        generator = torch.Generator().manual_seed(1)
        for _ in range(width + 1):
            torch.empty(1, vocabulary).exponential_(generator=generator)

    greedy, drawn = right(False), right(True)
    runs: dict[str, Callable[[], object]] = {
        "greedy": lambda: check(False, greedy), "sampled": lambda: check(True, drawn), "draw": draw,
    }  # fmt: skip
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(repeats + 3):
        for name, run in runs.items():
            started = time.perf_counter()
            run()
            if number >= 3:
                seconds[name].append(time.perf_counter() - started)
    return {name: statistics.median(values) for name, values in seconds.items()}


def main(words: Sequence[str] | None = None) -> None:
    """Drafts of several lengths over a vocabulary."""
    parser = argparse.ArgumentParser("polyspec measure checks", description=__doc__)
    parser.add_argument("--vocabulary", type=arguments.count, default=49_152)
    parser.add_argument("--widths", type=arguments.count, nargs="+", default=[1, 4, 8, 16])
    parser.add_argument("--repeats", type=arguments.count, default=101)
    given = parser.parse_args(words)
    print(describe())
    print(f"ms for a check over {given.vocabulary} ids, medians of {given.repeats}")
    for width in given.widths:
        found = {name: 1000 * value for name, value in check_times(width, given.vocabulary, given.repeats).items()}
        share = found["sampled"] / (found["greedy"] + found["draw"])
        named = ", ".join(f"{name} {value:.2f}" for name, value in found.items())
        print(f"  {width} tokens: {named}; sampled / (greedy + draw) {share:.2f}")
