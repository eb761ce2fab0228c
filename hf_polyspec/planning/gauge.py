# SPDX-License-Identifier: Apache-2.0
"""The times behind some predictions, taken again while the candidates are run.

A prediction is made of pass times, acceptance and overheads. Acceptance belongs to the texts and stays; the times
belong to the machine, whose speed may be another one minutes later, and not by the same factor for narrow and for wide
passes. So everything the candidates' predictions need is timed once for every text and repeat, a little after every
call, and predicted from those times alone. How long the calls themselves took is never looked at.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Protocol

import torch

from ..cpu.packing import packed_assistants
from .agreement import DraftRecord, TreeSize, time_drafts
from .candidates import Level
from .costs import TOKENS, Drafted, Read, Shape, Switched, What, draft_lengths, kind, pass_of, stopwatches
from .overheads import OverheadProbe
from .replay import Chain, Measurements
from .texts import Law, time_plain
from .theory.cost_model import SecondsTable
from .turns import Turn, over_turns, settled

Job = tuple[int, int, TreeSize | None]
_CHECKING = 0
"""Stands among the lengths of a tree's drafts for the pass that checks it."""


class Gauge(Protocol):
    """What `verify` asks for times."""

    def turn(self, repeat: int, place: int, parts: int) -> list[Callable[[], None]]:
        """Everything timed once, in as many parts as there are calls on the text at this place."""
        ...

    def measurements(self) -> Measurements:
        """The records with the times of the turns so far."""
        ...


class TakenAgain:
    """Times everything that the predictions of some candidates are made of.

    Args:
        levels: the target first; chains: the candidates'.
        measured: the records; law: of the plan; temperature: of the plan.
    """

    def __init__(
        self, levels: Sequence[Level], chains: Sequence[Chain], measured: Measurements, law: Law, temperature: float
    ) -> None:
        self.members: list[Any] = [level.member for level in levels]
        self.longest = [level.longest for level in levels]
        self.measured = measured
        self.law = law
        self.temperature = temperature
        self.plain = any(chain.plain for chain in chains)
        self.jobs: list[Job] = [job for job in measured.drafts if any(_uses(chain, job) for chain in chains)]
        self.dice = random.Random(0)
        self.times: dict[tuple[int, What], dict[Turn, float]] = {}
        self.readings: dict[tuple[int, int], dict[Turn, float]] = {}
        self.drafts: dict[tuple[Job, int], dict[Turn, float]] = {}
        self.steps: dict[Turn, tuple[float, float | None]] = {}
        self.watches: dict[tuple[int, What], Callable[[], float]] = {}
        text = measured.texts[0]
        sizes = {place: _sizes(place, chains, measured) for place in measured.costs}
        self.places = sorted(place for place, wanted in sizes.items() if wanted)
        with self._packed():
            for place in self.places:
                others = [one for one in self.places if one != place]
                other = partial(pass_of, self.watches, others[0]) if others else None
                wanted = [*sizes[place], *([Switched()] if others else [])]
                watches = stopwatches(self.members[place], text.prompt + text.new, wanted, law, other)
                self.watches |= {(place, what): watch for what, watch in watches.items()}
        middle = next((self.members[p] for p in self.places if p and (0, p) not in measured.bound), None)
        self.outside = OverheadProbe(self.members[0], middle)

    def turn(self, repeat: int, place: int, parts: int) -> list[Callable[[], None]]:
        """Everything timed once, in parts of about as many passes, in an order drawn anew.

        Args:
            repeat, place: which calls it lies between; parts: how many of them there are.
        """
        at, text = (repeat, place), self.measured.texts[place]
        inside: list[tuple[int, Callable[[], None]]] = [
            (key[0], partial(self._time, self.times.setdefault(key, {}), at, watch))
            for key, watch in self.watches.items()
        ]
        for model in self.places:
            if model == 0 or model not in self.measured.copies:
                ids, count = text.prompt + text.new, len(text.prompt)
                watch = stopwatches(self.members[model], ids, [Read(count)], self.law)[Read(count)]
                inside.append((model, partial(self._time, self.readings.setdefault((model, place), {}), at, watch)))
        inside += [(job[0], partial(self._draft, at, job)) for job in self.jobs]
        alone = self.outside.probes(at, text.prompt) if self.places else []
        alone += [partial(self._steps, at)] if self.plain else []
        self.dice.shuffle(inside)
        self.dice.shuffle(alone)
        return [partial(self._part, alone[n::parts], inside[n::parts]) for n in range(parts)]

    def measurements(self) -> Measurements:
        """The records with the times of the turns so far; acceptance is untouched."""
        found = settled(self.times, kind)
        costs = dict(self.measured.costs)
        for place in self.places:
            rounds = {w.tokens: t for (p, w), t in found.items() if p == place and isinstance(w, Shape)}
            drafts = {w.tokens: t for (p, w), t in found.items() if p == place and isinstance(w, Drafted)}
            switch = found.get((place, Switched()))
            costs[place] = costs[place].renewed(rounds, drafts, self._readings(place), switch)
        drafted = settled(self.drafts, lambda key: (key[0], key[1] == _CHECKING))
        records = {job: _renewed(record, job, drafted) for job, record in self.measured.drafts.items()}
        overheads = self.outside.found() if self.places else self.measured.overheads
        again = replace(self.measured, costs=costs, drafts=records, overheads=overheads, _tables={})
        return replace(again, texts=self._texts())

    def _packed(self) -> Any:
        """Models as generate() runs them in a chain."""
        return packed_assistants(self.members[1:], self.members[0])

    @torch.no_grad()
    def _part(self, alone: Sequence[Callable[[], None]], inside: Sequence[tuple[int, Callable[[], None]]]) -> None:
        with torch.random.fork_rng():  # the calls draw as they would without this
            for probe in alone:
                probe()
            if not inside:
                return
            with self._packed():
                for place in {place for place, _ in inside if place in self.places}:
                    # What a model does once after it was packed is a part of calls, not of passes.
                    next(watch for (model, _), watch in self.watches.items() if model == place)()
                for _, probe in inside:
                    probe()

    @staticmethod
    def _time(times: dict[Turn, float], at: Turn, watch: Callable[[], float]) -> None:
        times[at] = watch()

    def _draft(self, at: Turn, job: Job) -> None:
        above, drafter, tree = job
        seconds, checking = time_drafts(
            self.members[above],
            self.members[drafter],
            self.measured.texts[at[1]],
            self.law,
            longest=self.longest[drafter],
            tree=tree,
        )
        for tokens, value in seconds.points:
            self.drafts.setdefault((job, tokens), {})[at] = value
        if checking is not None:
            self.drafts.setdefault((job, _CHECKING), {})[at] = checking

    def _steps(self, at: Turn) -> None:
        self.steps[at] = time_plain(self.members[0], self.measured.texts[at[1]], self.temperature)

    def _readings(self, place: int) -> dict[int, float]:
        """Seconds by ids; prompts of one length count together."""
        of_length: dict[int, list[float]] = {}
        for (model, text), times in self.readings.items():
            if model == place:
                length = len(self.measured.texts[text].prompt)
                of_length.setdefault(length, []).append(statistics.median(times.values()))
        return {length: statistics.fmean(found) for length, found in of_length.items()}

    def _texts(self) -> list[Any]:
        """With what plain decoding takes now: every text's first token, and one time of a step for all."""
        steps = {at: step for at, (_, step) in self.steps.items() if step is not None}
        if not steps:
            return self.measured.texts
        step = over_turns(steps)
        found = []
        for place, text in enumerate(self.measured.texts):
            first = [seconds for (_, at), (seconds, _) in self.steps.items() if at == place]
            seconds = statistics.median(first) if first else text.first_seconds
            found.append(replace(text, first_seconds=seconds, step_seconds=step))
        return found


def _uses(chain: Chain, job: Job) -> bool:
    return not chain.plain and (*chain.levels[-2:], chain.tree) == job


def _sizes(place: int, chains: Sequence[Chain], measured: Measurements) -> list[What]:
    """What is timed of a model: all measured sizes up to the largest that a chain may ask of it."""
    largest = drafted = 0
    for chain in chains:
        if chain.plain or place not in chain.levels:
            continue
        at, last = chain.levels.index(place), len(chain.levels) - 1
        longest = chain.tree.depth if chain.tree is not None else chain.draft
        if at == last:
            drafted = max(drafted, longest)
        else:
            largest = max(largest, longest + 1 + (chain.block if at < last - 1 else 0))
    if not largest and not drafted:
        return []
    context = min(shape.context for shape, _ in measured.costs[place].shapes)
    # A model that only drafts still reads: the time of one token is taken off its first pass.
    end = next((i for i, tokens in enumerate(TOKENS) if tokens >= largest), len(TOKENS) - 1)
    shapes: list[What] = [Shape(tokens, 1, context) for tokens in TOKENS[: end + 1]]
    return [*shapes, *(Drafted(tokens) for tokens in (draft_lengths(drafted) if drafted else ()))]


def _renewed(record: DraftRecord, job: Job, seconds: Mapping[tuple[Job, int], float]) -> DraftRecord:
    points = tuple(sorted((n, t) for (other, n), t in seconds.items() if other == job and n != _CHECKING))
    if not points:
        return record
    checking = seconds.get((job, _CHECKING), record.checking)
    return replace(record, seconds=SecondsTable(points), checking=checking)
