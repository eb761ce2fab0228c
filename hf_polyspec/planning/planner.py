# SPDX-License-Identifier: Apache-2.0
"""From a target and its assistants to a plan: measure, search, explain."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from transformers import GenerationConfig

from ..cpu.packing import is_packed, packed_assistants
from ..generation.chain import check_assistants
from ..generation.plan import Plan, mark_of
from ..host.configs import generation_config
from ..host.lending import is_copy
from ..levels.names import name_of
from .agreement import TREES, DraftRecord, TreeSize, record_drafts
from .candidates import Level, describe_chain, describe_sizes, kind_of, options_of
from .costs import measure_costs, steps
from .overheads import Overheads, measure_overheads
from .readings import Reading, edge, noise_seconds, read_model, survival, windows
from .reasons import Dropped, reasons
from .replay import Measurements
from .search import Candidate, best_of_each, search
from .texts import Law, Text, law_of, write_texts

Progress = Callable[[str, int, int], None]
"""(what is going on, steps done, steps in all)"""


def _silent(what: str, done: int, total: int) -> None:
    """No progress shown."""


@dataclass(frozen=True)
class Wish:
    """What is to be planned.

    Attributes:
        temperature: 0 for greedy; new_tokens: of each text.
        repeats: rounds of every shape, medians count; draft_seconds: spent on recording each drafter.
        batches: whether passes over batches of 2 to 8 rows are measured too.
        seed: of the texts and of the coupling.
    """

    temperature: float = 0.0
    new_tokens: int = 64
    repeats: int = 5
    draft_seconds: float = 8.0
    batches: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature must be a number of at least 0, got {self.temperature!r}.")
        for name, least in (("new_tokens", 8), ("repeats", 1)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"{name} must be a whole number of at least {least}, got {value!r}.")
        if self.draft_seconds <= 0:
            raise ValueError(f"draft_seconds must be more than 0, got {self.draft_seconds!r}.")


@dataclass
class Planned:
    """A search with everything it was made of.

    Attributes:
        levels: the target first; wish: what was asked for.
        config: of the texts.
        measured: the records; candidates: the quickest first; dropped: why assistants are left out.
    """

    levels: list[Level]
    wish: Wish
    config: GenerationConfig
    measured: Measurements
    candidates: list[Candidate]
    dropped: list[Dropped]

    @property
    def best(self) -> Candidate:
        """The choice: the candidate predicted to be the quickest, or, once some were run, the quickest of these."""
        ran = [one for one in self.candidates if one.measured is not None]
        return max(ran, key=lambda one: one.measured or 0.0) if ran else self.expected

    @property
    def expected(self) -> Candidate:
        """The candidate predicted to be the quickest."""
        return self.candidates[0]

    @property
    def plain(self) -> Candidate:
        """Plain decoding."""
        return next(one for one in self.candidates if one.chain.plain)

    def with_measured(self, run: Sequence[Candidate]) -> Planned:
        """The same with what was measured of some candidates."""
        known = {one.chain: one for one in run}
        return replace(self, candidates=[known.get(one.chain, one) for one in self.candidates])

    def plan(self, candidate: Candidate | None = None) -> Plan:
        """The plan for a candidate, by default the best."""
        from ..models.environment import describe
        from ..version import __version__

        choice = candidate or self.best
        shown = [c for c in self.candidates if c.measured is not None]
        shown += [c for c in best_of_each(self.candidates) if c.measured is None]
        return Plan(
            made_by=f"hf_polyspec {__version__}",
            machine=describe(),
            target=mark_of(self.levels[0].member, self.levels[0].name),
            assistants=tuple(mark_of(level.member, level.name) for level in self.levels[1:]),
            temperature=self.wish.temperature,
            new_tokens=self.wish.new_tokens,
            chosen=tuple(place - 1 for place in choice.chain.levels[1:]),
            options=options_of(choice.chain),
            tokens_per_second=choice.predicted.tokens_per_second,
            plain_tokens_per_second=self.plain.predicted.tokens_per_second,
            candidates=tuple(_row(c, self.measured.names) for c in shown),
            dropped=tuple(vars(one) for one in self.dropped),
            costs=_costs(self.measured),
            acceptance=_acceptance(self.measured),
            packed=is_packed(self.levels[0].member),
        )


def make_plan(
    target: Any,
    assistants: Sequence[Any],
    prompts: Sequence[list[int]],
    wish: Wish | None = None,
    *,
    names: Sequence[str] | None = None,
    progress: Progress = _silent,
) -> Planned:
    """Measure a target and its assistants, and search for the quickest chain.

    Args:
        target: the model; assistants: what `generate(assistant_models=...)` takes, the slowest first.
        prompts: ids of real prompts.
        wish: temperature, length and care; the default is greedy.
        names: of the levels, the target first.
        progress: told what is going on.

    Returns:
        Everything that was found; `.plan()` is what to keep.

    Raises:
        ValueError, TypeError: no chain can be made of these.
    """
    wish = wish or Wish()
    if not prompts or not all(prompts):
        raise ValueError("a plan needs at least one prompt, and none that is empty.")
    levels = _levels(target, assistants, names)
    config = generation_config(target, wish.new_tokens, wish.temperature)
    with torch.random.fork_rng():
        torch.manual_seed(wish.seed)
        target.generate(
            torch.tensor([prompts[0]], device=target.device),
            attention_mask=torch.ones(1, len(prompts[0]), dtype=torch.long, device=target.device),
            generation_config=generation_config(target, 2, wish.temperature),
        )
        law = law_of(target, prompts[0], config)
        texts = write_texts(target, prompts, config, _counter(progress, "the target writes", len(prompts)))
        measured = _measure(levels, texts, law, wish, progress)
    candidates = search(levels, measured)
    return Planned(levels, wish, config, measured, candidates, reasons(levels, candidates, measured))


def _levels(target: Any, assistants: Sequence[Any], names: Sequence[str] | None) -> list[Level]:
    if not isinstance(assistants, (list, tuple)) or not assistants:
        raise ValueError("a plan needs at least one assistant to choose from.")
    members = [target, *assistants]
    if names is None:
        names = [_name(member, place) for place, member in enumerate(members)]
    return [
        Level(name, place, member, kind_of(member) if place else "model")
        for place, (name, member) in enumerate(zip(names, members, strict=True))
    ]


def _name(member: Any, place: int) -> str:
    return name_of(member) or f"{type(member).__name__} {place}"


def _measure(levels: Sequence[Level], texts: list[Text], law: Law, wish: Wish, progress: Progress) -> Measurements:
    models = [level for level in levels if level.kind == "model"]
    bound = _misfits(levels)
    middle = next((m for m in models[1:] if (0, m.place) not in bound), None)
    overheads = measure_overheads(levels[0].member, middle.member if middle else None, texts[0].prompt)
    with packed_assistants([level.member for level in levels[1:]], levels[0].member):  # as generate() runs them
        return _measure_packed(levels, models, texts, law, wish, progress, bound, overheads)


def _measure_packed(
    levels: Sequence[Level],
    models: list[Level],
    texts: list[Text],
    law: Law,
    wish: Wish,
    progress: Progress,
    bound: dict[tuple[int, int], str],
    overheads: Overheads,
) -> Measurements:
    context = round(sum(len(text.prompt) + len(text.new) / 2 for text in texts) / len(texts))
    members = [m.member for m in models]
    drafts = {i: m.longest for i, m in enumerate(models) if m.place}
    prompts = [len(text.prompt) for text in texts]
    total = steps(members, context, wish.repeats, wish.batches, drafts, prompts)
    count = _counter(progress, "passes are timed", total)
    costs = measure_costs(
        members,
        texts[0].prompt + texts[0].new,
        context,
        law,
        repeats=wish.repeats,
        batches=wish.batches,
        drafts=drafts,
        prompts=prompts,
        advance=lambda n: count(),
    )
    copies = frozenset(m.place for m in models[1:] if is_copy(m.member, levels[0].member))
    readings = _readings(models, copies, texts, law, wish, progress)
    edges = {
        (above.place, below.place): [
            edge(a, b) for a, b in zip(readings[above.place], readings[below.place], strict=True)
        ]
        for i, above in enumerate(models)
        for below in models[i + 1 :]
    }
    of_place = dict(zip((m.place for m in models), costs, strict=True))
    names = [level.name for level in levels]
    drawing = noise_seconds(readings[0][0].laws) if law.do_sample else 0.0
    measured = Measurements(names, texts, of_place, edges, {}, overheads, drawing, bound, copies)
    return replace(measured, drafts=_drafters(levels, readings, measured, law, wish, progress))


def _readings(
    models: Sequence[Level], copies: frozenset[int], texts: list[Text], law: Law, wish: Wish, progress: Progress
) -> dict[int, list[Reading]]:
    count = _counter(progress, "models read the texts", len(models) * len(texts))
    generator = torch.Generator().manual_seed(wish.seed + 1)
    readings: dict[int, list[Reading]] = {}
    for model in models:
        found = []
        for i, text in enumerate(texts):
            target = readings[0][i] if model.place else None
            lender = models[0].member if model.place in copies else None
            found.append(read_model(model.member, text, law, target, generator, lender))
            count()
        readings[model.place] = found
    return readings


def _drafters(
    levels: Sequence[Level],
    readings: dict[int, list[Reading]],
    measured: Measurements,
    law: Law,
    wish: Wish,
    progress: Progress,
) -> dict[tuple[int, int, TreeSize | None], DraftRecord]:
    """Records of all that only draft, under every level they may stand under."""
    texts = measured.texts
    jobs = _jobs(levels, measured)
    count = _counter(progress, "drafters draft", len(jobs) * len(texts))
    drafts: dict[tuple[int, int, TreeSize | None], DraftRecord] = {}
    for above, drafter, tree in jobs:
        record = record_drafts(
            above.member,
            drafter.member,
            texts,
            readings[above.place],
            law,
            longest=drafter.longest,
            tree=tree,
            budget=wish.draft_seconds,
            blind_first=drafter.kind == "head",
            advance=count,
        )
        if record is not None:
            drafts[above.place, drafter.place, tree] = record
    return drafts


def _jobs(levels: Sequence[Level], measured: Measurements) -> list[tuple[Level, Level, TreeSize | None]]:
    jobs: list[tuple[Level, Level, TreeSize | None]] = []
    for drafter in levels[1:]:
        if drafter.kind == "model":
            continue
        above = [
            level
            for level in levels[: drafter.place]
            if level.kind == "model" and (level.place, drafter.place) not in measured.bound
        ]
        trees: tuple[TreeSize | None, ...] = (None, *TREES) if drafter.kind == "head" else (None,)
        jobs += [(level, drafter, tree) for level in above for tree in trees]
    return jobs


def _misfits(levels: Sequence[Level]) -> dict[tuple[int, int], str]:
    """Pairs that cannot stand above each other, with the reason; other chains are still searched.

    Raises:
        ValueError: no assistant can stand under the target.
    """
    found: dict[tuple[int, int], str] = {}
    for above in levels:
        for below in levels[above.place + 1 :]:
            if above.kind != "model":
                continue
            try:
                check_assistants(above.member, [below.member])
            except ValueError as error:
                found[above.place, below.place] = str(error)
    if all((0, below.place) in found for below in levels[1:]):
        raise ValueError(next(iter(found.values())))
    return found


def _counter(progress: Progress, what: str, total: int) -> Callable[[], None]:
    done = 0
    progress(what, 0, total)

    def count() -> None:
        nonlocal done
        done += 1
        progress(what, done, total)

    return count


def _row(candidate: Candidate, names: Sequence[str]) -> dict[str, Any]:
    return {
        "chain": describe_chain(candidate.chain, names),
        "sizes": describe_sizes(candidate.chain),
        "levels": [place - 1 for place in candidate.chain.levels[1:]],
        "options": options_of(candidate.chain),
        "predicted": candidate.predicted.tokens_per_second,
        "predicted_anew": None if candidate.anew is None else candidate.anew.tokens_per_second,
        "measured": candidate.measured,
    }


def _costs(measured: Measurements) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for place, costs in measured.costs.items():
        rounds = [[s.tokens, s.batch, s.context, seconds] for s, seconds in costs.shapes]
        prompts = [list(point) for point in costs.prefill.points]
        found[measured.names[place]] = {"rounds": rounds, "prompts": prompts, "switch": costs.switch}
        if costs.drafting is not None:
            found[measured.names[place]]["drafts"] = [list(point) for point in costs.drafting.points]
    for (above, place, tree), record in measured.drafts.items():
        size = "" if tree is None else f", tree {tree.tokens}"
        key = f"{measured.names[place]} under {measured.names[above]}{size}"
        found[key] = {"drafts": [list(point) for point in record.seconds.points]}
        if record.checking is not None:
            found[key]["checking"] = record.checking
    found["outside the levels"] = vars(measured.overheads)
    return found


def _acceptance(measured: Measurements, positions: int = 8) -> dict[str, list[float]]:
    """Mean survival by position of every pair, for reading and for a control that starts from it."""
    found: dict[str, list[float]] = {}
    for (above, below), ratios in measured.edges.items():
        kept = np.concatenate([survival(windows(r, positions))[:-positions] for r in ratios])
        if len(kept):
            found[f"{measured.names[below]} under {measured.names[above]}"] = kept.mean(axis=0).tolist()
    for (above, place, tree), record in measured.drafts.items():
        # A draft that the text's end cuts short says nothing about the later positions.
        rows = [d.logs[:-positions][d.recorded[:-positions], :positions] for d in record.drafts]
        kept = survival(np.concatenate(rows))
        if len(kept):
            size = "" if tree is None else f", tree {tree.tokens}"
            found[f"{measured.names[place]} under {measured.names[above]}{size}"] = kept.mean(axis=0).tolist()
    return found
