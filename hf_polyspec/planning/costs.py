# SPDX-License-Identifier: Apache-2.0
"""What a round of every model costs here: measured through the engine itself, models taking turns."""

from __future__ import annotations

import random
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from ..host.positions import positions_told
from ..levels.verifier import Verifier
from .rig import Offer, rig
from .texts import Law, Resting, context_of
from .theory.cost_model import SecondsTable
from .turns import Turn, settled

TOKENS = (1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 24, 32, 48, 64)
FEW_TOKENS = (1, 8, 32)
BATCHES = (2, 4, 8)
BATCH_TOKENS = (1, 4, 8)
LARGEST_PASS = 64
LONG = 4
DRAFTS = (1, 2, 4)
READINGS = 4
"""Most lengths of prompts whose reading is timed."""


@dataclass(frozen=True)
class Shape:
    """A pass: `tokens` columns of `batch` rows after `context` cached ids."""

    tokens: int
    batch: int
    context: int


@dataclass(frozen=True)
class Drafted:
    """A draft of `tokens` tokens."""

    tokens: int


@dataclass(frozen=True)
class Read:
    """The first pass over a prompt of `ids` ids."""

    ids: int


@dataclass(frozen=True)
class Switched:
    """What a pass over one token takes longer right after a pass of another model."""


What = Shape | Drafted | Read | Switched


@dataclass(frozen=True)
class ModelCosts:
    """Seconds of one round of a model of its own: its pass, the judging of what was proposed, the bookkeeping.

    Attributes:
        shapes: what was measured, with the seconds of each.
        prefill: seconds of reading a prompt by its ids.
        drafting: seconds of a draft by its tokens, None for a model that never drafts.
        switch: seconds that a pass takes longer right after another model's: the CPU's caches hold that one then.
    """

    shapes: tuple[tuple[Shape, float], ...]
    prefill: SecondsTable
    drafting: SecondsTable | None = None
    switch: float = 0.0

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
        return self.prefill.seconds(ids)

    def renewed(
        self,
        rounds: Mapping[int, float],
        drafts: Mapping[int, float],
        readings: Mapping[int, float],
        switch: float | None = None,
    ) -> ModelCosts:
        """The same model on a machine whose speed has changed, where only some sizes of one row were timed again.

        The sizes that were not are left out, and what a longer context costs more grows as its pass at the short one.

        Args:
            rounds: seconds by tokens, at the short context; drafts: by tokens; readings: by ids.
            switch: as the attribute. Any that is empty or None stays as it was.
        """
        kept = self.shapes
        if rounds:
            short = min(shape.context for shape, _ in self.shapes)
            before, now = self._curve(short, 1), SecondsTable(tuple(sorted(rounds.items())))
            again = [(Shape(tokens, 1, short), seconds) for tokens, seconds in sorted(rounds.items())]
            grown = [
                (shape, seconds * now.seconds(shape.tokens) / max(1e-12, before.seconds(shape.tokens)))
                for shape, seconds in self.shapes
                if shape.context != short and shape.batch == 1
            ]
            kept = (*again, *grown)
        return ModelCosts(
            kept,
            SecondsTable(tuple(sorted(readings.items()))) if readings else self.prefill,
            SecondsTable(tuple(sorted(drafts.items()))) if drafts else self.drafting,
            self.switch if switch is None else max(0.0, switch),
        )

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
    """One model at one batch and context: the cache is filled once, every round rolls back to it.

    In a chain most passes follow one of the same model, so every round that counts is run after one that does not.
    """

    def __init__(self, model: Any, ids: Sequence[int], batch: int, context: int, law: Law) -> None:
        text = [ids[i % len(ids)] for i in range(context + LARGEST_PASS)]
        self.offer = Offer()
        self.chain: Verifier = rig(model, [self.offer], batch=batch)
        self.rows = context_of([text[:context] for _ in range(batch)], context)
        self.tokens = text[context:]
        self.law = law.maker(noise=Resting(self.chain.vocabulary, law.device))
        self.first_seconds = self._round(1)

    def seconds(self, tokens: int) -> float:
        """Of one round whose pass covers this many columns."""
        self._round(1)
        return self._round(tokens)

    def switched(self, other: Callable[[], object]) -> float:
        """What a round takes longer after passes of another model than after one of its own."""
        other()
        return self._round(1) - self._round(1)

    def _round(self, tokens: int) -> float:
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
        self.law = law.maker(noise=Resting(chain.vocabulary, law.device))
        self._draft(1)  # reads the context

    def seconds(self, tokens: int) -> float:
        """Of one draft of this many tokens."""
        self._draft(1)
        return self._draft(tokens)

    def _draft(self, tokens: int) -> float:
        before = self.below.stats.seconds
        self.below.propose(self.rows, [tokens], self.law)
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
    prompts: Sequence[int] = (),
    advance: Callable[[int], None] = lambda steps: None,
) -> list[ModelCosts]:
    """Measure every model at every shape, in turns, so that a slow minute of the machine falls on all of them.

    Args:
        models: the target and the assistants that are models.
        ids: any text of the target.
        context: cached ids of the short context.
        law: of the plan.
        repeats: rounds of each shape (see `turns` for what counts), after one that is thrown away.
        batches: whether batches of 2 to 8 rows are measured too.
        drafts: the longest draft of each model that may draft, by its place in `models`.
        prompts: lengths of the prompts, whose reading is timed; without any, that of the short context is.
        advance: told how many of `steps(...)` are done.

    Returns:
        One entry a model.
    """
    wanted = _all_wanted(models, context, batches, drafts, prompts)
    watches: dict[tuple[int, What], Callable[[], float]] = {}
    for i, model in enumerate(models):
        other = partial(pass_of, watches, int(i == 0))
        watches |= {(i, what): watch for what, watch in stopwatches(model, ids, wanted[i], law, other).items()}
    found = settled(_in_turns(watches, repeats, advance), kind)
    costs = []
    for i, of_model in enumerate(wanted):
        drafted = tuple((w.tokens, found[i, w]) for w in of_model if isinstance(w, Drafted))
        costs.append(
            ModelCosts(
                tuple((w, found[i, w]) for w in of_model if isinstance(w, Shape)),
                SecondsTable(tuple((w.ids, found[i, w]) for w in of_model if isinstance(w, Read))),
                SecondsTable(drafted) if drafted else None,
                max(0.0, found.get((i, Switched()), 0.0)),
            )
        )
    return costs


@torch.no_grad()
def stopwatches(
    model: Any, ids: Sequence[int], wanted: Sequence[What], law: Law, other: Callable[[], object] | None = None
) -> dict[What, Callable[[], float]]:
    """For everything that is to be timed of a model, what times it once and returns the seconds.

    Args:
        model: a causal LM, packed as it runs in a chain both now and whenever one of these is called.
        ids: any text of the target; wanted: what to time; law: of the plan.
        other: a pass of another model, where `Switched` is wanted.
    """
    shaped = [what for what in wanted if isinstance(what, Shape)]
    benches = {key: _Bench(model, ids, *key, law) for key in dict.fromkeys((s.batch, s.context) for s in shaped)}
    drafted = [what for what in wanted if isinstance(what, Drafted)]
    if drafted:
        context = min(shape.context for shape in shaped)
        drafter = _DraftBench(model, ids, context, max(what.tokens for what in drafted), law)
    found: dict[What, Callable[[], float]] = {}
    for what in wanted:
        if isinstance(what, Shape):
            found[what] = partial(benches[what.batch, what.context].seconds, what.tokens)
        elif isinstance(what, Drafted):
            found[what] = partial(drafter.seconds, what.tokens)
        elif isinstance(what, Read):
            found[what] = partial(_read, model, ids, what.ids, law)
        elif other is not None:
            found[what] = partial(benches[1, min(shape.context for shape in shaped)].switched, other)
    return found


def pass_of(watches: Mapping[tuple[int, What], Callable[[], float]], place: int) -> None:
    """The narrowest pass that is timed of a model, whatever it takes."""
    passes = [(what, watch) for (at, what), watch in watches.items() if at == place and isinstance(what, Shape)]
    min(passes, key=lambda timed: timed[0].tokens * timed[0].batch)[1]()


def _read(model: Any, ids: Sequence[int], count: int, law: Law) -> float:
    return _Bench(model, ids, 1, count, law).first_seconds


def _all_wanted(
    models: Sequence[Any], context: int, batches: bool, drafts: Mapping[int, int] | None, prompts: Sequence[int]
) -> list[list[What]]:
    """Everything that is timed of every model."""
    longest = drafts or {}
    switched: list[What] = [Switched()] if len(models) > 1 else []
    return [_wanted(model, context, batches, longest.get(i), prompts) + switched for i, model in enumerate(models)]


def _wanted(model: Any, context: int, batches: bool, longest: int | None, prompts: Sequence[int]) -> list[What]:
    """Everything that is timed of a model by itself, sizes of each kind rising."""
    shaped = shapes(context, positions_told(model), batches=batches)
    lengths = sorted(set(prompts)) or [shaped[0].context]
    some = lengths if len(lengths) <= READINGS else [lengths[i * (len(lengths) - 1) // 3] for i in range(READINGS)]
    return [
        *shaped,
        *(Drafted(tokens) for tokens in (draft_lengths(longest) if longest else ())),
        *(Read(count) for count in dict.fromkeys(some)),
    ]


def draft_lengths(longest: int) -> list[int]:
    """The lengths at which drafts are timed, up to the longest that is tried."""
    return sorted({*(tokens for tokens in DRAFTS if tokens < longest), longest})


def kind(key: tuple[int, What]) -> Hashable:
    """Times that are settled together: those of a model in one batch and context, its drafts, its readings."""
    place, what = key
    return (place, type(what), *((what.batch, what.context) if isinstance(what, Shape) else ()))


def _in_turns(
    watches: Mapping[tuple[int, What], Callable[[], float]], repeats: int, advance: Callable[[int], None]
) -> dict[tuple[int, What], dict[Turn, float]]:
    """Seconds of each, all run once in every turn, in an order drawn anew; the first turn does not count."""
    times: dict[tuple[int, What], dict[Turn, float]] = {key: {} for key in watches}
    order = list(times)
    turns = random.Random(0)
    for turn in range(-1, repeats):
        turns.shuffle(order)
        for key in order:
            seconds = watches[key]()
            if turn >= 0:
                times[key][turn, 0] = seconds
            advance(1)
    return times


def steps(
    models: Sequence[Any],
    context: int,
    repeats: int = 5,
    batches: bool = True,
    drafts: Mapping[int, int] | None = None,
    prompts: Sequence[int] = (),
) -> int:
    """How many times `measure_costs` calls `advance`."""
    return (repeats + 1) * sum(map(len, _all_wanted(models, context, batches, drafts, prompts)))
