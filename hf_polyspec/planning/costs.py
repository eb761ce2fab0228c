# SPDX-License-Identifier: Apache-2.0
"""What a round of every model costs here: measured through the engine itself, models taking turns, medians kept."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from ..levels.verifier import Verifier
from .cost_model import SecondsTable
from .rig import Offer, rig
from .texts import Law, context_of, generation_config

TOKENS = (1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 24, 32, 48, 64)
FEW_TOKENS = (1, 8, 32)
BATCHES = (2, 4, 8)
BATCH_TOKENS = (1, 4, 8)
LARGEST_PASS = 64
LONG = 4
DRAFTS = (1, 2, 4)


@dataclass(frozen=True)
class Shape:
    """A pass: `tokens` columns of `batch` rows after `context` cached ids."""

    tokens: int
    batch: int
    context: int


@dataclass(frozen=True)
class ModelCosts:
    """Seconds of one round of a model of its own: its pass, the judging of what was proposed, the bookkeeping.

    Attributes:
        shapes: what was measured, with the median seconds of each.
        prefill: (ids, seconds) of reading a prompt.
        drafting: seconds of a draft by its tokens, None for a model that never drafts.
    """

    shapes: tuple[tuple[Shape, float], ...]
    prefill: tuple[int, float]
    drafting: SecondsTable | None = None

    def table(self, context: float, batch: int = 1) -> SecondsTable:
        """Seconds by tokens at a context length, between the two that were measured or beyond.

        Args:
            context: cached ids.
            batch: rows; between and beyond those measured, the time of a pass with as many columns.
        """
        short, long = min(s.context for s, _ in self.shapes), max(s.context for s, _ in self.shapes)
        base = self._curve(short, 1)
        far = self._curve(long, 1)
        share = 0.0 if long == short else max(0.0, (context - short) / (long - short))
        rows = self._curve(short, batch) if any(s.batch == batch for s, _ in self.shapes) else None
        points = []
        for tokens, _ in base.points:
            if rows is not None and tokens <= rows.points[-1][0]:
                seconds = rows.seconds(tokens)
            else:
                seconds = base.seconds(tokens * batch)
            grown = max(0.0, far.seconds(tokens) - base.seconds(tokens))
            points.append((tokens, seconds + share * batch * grown))
        return SecondsTable(tuple(points))

    def reading(self, ids: float) -> float:
        """Seconds of reading a prompt."""
        return self.prefill[1] * ids / self.prefill[0]

    def _curve(self, context: int, batch: int) -> SecondsTable:
        points = sorted((s.tokens, t) for s, t in self.shapes if s.context == context and s.batch == batch)
        return SecondsTable(tuple(points))


def shapes(context: int, longest: int | None, *, batches: bool = True) -> list[Shape]:
    """The shapes measured: all token counts at the short context, a few at the long one and for batches.

    Args:
        context: of the texts; longest: positions a model has, None for any.
        batches: whether rows besides one are wanted.
    """
    room = (longest or 1 << 30) - max(TOKENS) - 1
    short = max(1, min(context, room))
    long = max(short, min(LONG * context, room))
    found = [Shape(tokens, 1, short) for tokens in TOKENS]
    if long > short:
        found += [Shape(tokens, 1, long) for tokens in FEW_TOKENS]
    if batches:
        found += [Shape(k, b, short) for b in BATCHES for k in BATCH_TOKENS if k * b <= LARGEST_PASS]
    return found


class _Bench:
    """One model at one batch and context: the cache is filled once, every round rolls back to it."""

    def __init__(self, model: Any, ids: Sequence[int], batch: int, context: int, law: Law) -> None:
        text = [ids[i % len(ids)] for i in range(context + LARGEST_PASS)]
        self.offer = Offer(drawn=True)
        self.chain: Verifier = rig(model, [self.offer], batch=batch)
        self.rows = context_of([text[:context] for _ in range(batch)], context)
        self.tokens = text[context:]
        self.law = law.maker()
        self.first_seconds = self.seconds(1)

    def seconds(self, tokens: int) -> float:
        """Of one round whose pass covers this many columns."""
        self.offer.tokens = self.tokens[: tokens - 1]
        before = self.chain.stats.seconds
        self.chain.round(self.rows, [tokens] * self.rows.batch, self.law)
        return self.chain.stats.seconds - before


class _DraftBench:
    """One model as a drafter, one row: every draft starts from the same cached ids."""

    def __init__(self, model: Any, ids: Sequence[int], context: int, longest: int, law: Law) -> None:
        # What a draft costs does not depend on who checks it, and a model always fits under itself.
        chain = rig(model, [model], num_assistant_tokens=longest)
        self.below = chain.below
        self.rows = context_of([[ids[i % len(ids)] for i in range(context)]], context)
        self.law = law
        self.seconds(1)  # reads the context

    def seconds(self, tokens: int) -> float:
        """Of one draft of this many tokens."""
        before = self.below.stats.seconds
        self.below.propose(self.rows, [tokens], self.law.maker())
        return self.below.stats.seconds - before


@torch.no_grad()
def measure_costs(
    models: Sequence[Any],
    ids: Sequence[int],
    context: int,
    law: Law,
    *,
    repeats: int = 5,
    batches: bool = True,
    drafts: Mapping[int, int] | None = None,
    advance: Callable[[int], None] = lambda steps: None,
) -> list[ModelCosts]:
    """Measure every model at every shape, in turns, so that a slow minute of the machine falls on all of them.

    Args:
        models: the target and the assistants that are models.
        ids: any text of the target.
        context: cached ids of the short context.
        law: of the plan.
        repeats: rounds of each shape; the median counts, after one that is thrown away.
        batches: whether batches of 2 to 8 rows are measured too.
        drafts: the longest draft of each model that may draft, by its place in `models`.
        advance: told how many of `steps(...)` are done.

    Returns:
        One entry a model.
    """
    wanted = [shapes(context, _positions(model), batches=batches) for model in models]
    readings = [
        [_Bench(model, ids, 1, of_model[0].context, law).first_seconds for _ in range(3)]
        for model, of_model in zip(models, wanted, strict=True)
    ]
    watches: dict[tuple[int, Shape | int], Callable[[], float]] = {}
    for i, (model, of_model) in enumerate(zip(models, wanted, strict=True)):
        benches = {
            (batch, length): _Bench(model, ids, batch, length, law)
            for batch, length in dict.fromkeys((s.batch, s.context) for s in of_model)
        }
        for shape in of_model:
            watches[i, shape] = partial(benches[shape.batch, shape.context].seconds, shape.tokens)
        if longest := (drafts or {}).get(i):
            drafter = _DraftBench(model, ids, of_model[0].context, longest, law)
            for tokens in draft_lengths(longest):
                watches[i, tokens] = partial(drafter.seconds, tokens)
    found = _in_turns(watches, repeats, advance)
    costs = []
    for i, of_model in enumerate(wanted):
        points = tuple(sorted((key, t) for (place, key), t in found.items() if place == i and isinstance(key, int)))
        costs.append(
            ModelCosts(
                tuple((shape, found[i, shape]) for shape in of_model),
                (of_model[0].context, min(readings[i])),
                SecondsTable(points) if points else None,
            )
        )
    return costs


def draft_lengths(longest: int) -> list[int]:
    """The lengths at which drafts are timed, up to the longest that is tried."""
    return sorted({*(tokens for tokens in DRAFTS if tokens < longest), longest})


def _in_turns(
    watches: Mapping[tuple[int, Shape | int], Callable[[], float]], repeats: int, advance: Callable[[int], None]
) -> dict[tuple[int, Shape | int], float]:
    """Median seconds of each, all run once in every turn, in an order drawn anew; the first turn does not count."""
    times: dict[tuple[int, Shape | int], list[float]] = {key: [] for key in watches}
    order = list(times)
    turns = random.Random(0)
    for _ in range(repeats + 1):
        turns.shuffle(order)
        for key in order:
            times[key].append(watches[key]())
            advance(1)
    return {key: statistics.median(of_key[1:]) for key, of_key in times.items()}


def steps(
    models: Sequence[Any],
    context: int,
    repeats: int = 5,
    batches: bool = True,
    drafts: Mapping[int, int] | None = None,
) -> int:
    """How many times `measure_costs` calls `advance`."""
    passes = sum(len(shapes(context, _positions(model), batches=batches)) for model in models)
    return (repeats + 1) * (passes + sum(len(draft_lengths(longest)) for longest in (drafts or {}).values()))


@dataclass(frozen=True)
class Overheads:
    """Wall time that no level counts.

    Attributes:
        call: of one generate() call; per_round: of a target round; per_block_round: of a middle's round.
    """

    call: float = 0.0
    per_round: float = 0.0
    per_block_round: float = 0.0


def measure_overheads(target: Any, middle: Any | None, prompt: Sequence[int], repeats: int = 3) -> Overheads:
    """Run short generations whose drafts are wrong, and see what the levels do not account for.

    Args:
        target: the model; middle: an assistant that can check, or None.
        prompt: ids; repeats: generations of each kind, medians count.
    """
    short, long = 1, 9
    once = statistics.median(_unaccounted(target, [Offer()], prompt, short)[0] for _ in range(repeats))
    many = [_unaccounted(target, [Offer()], prompt, long) for _ in range(repeats)]
    often = statistics.median(rest for rest, _, _ in many)
    per_round = max(0.0, (often - once) / max(1, many[0][1] - 1))
    call = max(0.0, once - per_round)
    if middle is None:
        return Overheads(call, per_round)
    found = []
    for _ in range(repeats):
        rest, rounds, inner = _unaccounted(target, [middle, Offer()], prompt, long)
        found.append((rest - call - rounds * per_round) / max(1, inner))
    return Overheads(call, per_round, max(0.0, statistics.median(found)))


def _unaccounted(target: Any, members: list[Any], prompt: Sequence[int], tokens: int) -> tuple[float, int, int]:
    """Wall seconds outside the levels, target rounds and middle rounds of one generation."""
    from ..integration import generate

    ids = torch.tensor([list(prompt)], device=target.device)
    started = time.perf_counter()
    output = generate(
        target,
        ids,
        attention_mask=torch.ones_like(ids),
        assistant_models=members,
        generation_config=generation_config(target, tokens, 0.0),
        polyspec_block_size=4,
    )
    wall = time.perf_counter() - started
    levels = output.polyspec.levels
    inner = levels[1].rounds if len(levels) > 2 else 0
    return wall - sum(level.seconds for level in levels), levels[0].rounds, inner


def _positions(model: Any) -> int | None:
    found = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    return found if isinstance(found, int) and found > 0 else None
