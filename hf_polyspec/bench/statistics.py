# SPDX-License-Identifier: Apache-2.0
"""From records to figures: speeds, speed-ups with intervals, acceptance, time, memory, identity."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from ..metrics.speedup.speedup import MIN_QUESTIONS, interval, mean_of_ratios, ratio_of_means
from .journal import Line
from .methods import PLAIN
from .questions import TASKS

CONFIDENCE, RESAMPLES, BOOTSTRAP_SEED = 0.95, 10_000, 0
OVERALL = "overall"
"""The plain mean over the tasks, each weighing the same."""

Key = tuple[str, int, float]
"""Decoder (a method's name without its batch), batch size, temperature."""
Pair = tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]


@dataclass
class LevelFigures:
    """One level of a chain over all its calls.

    Attributes:
        name: of the level.
        passes: forward passes; seconds: in the level itself, those below excluded.
        rounds: checks; emitted: tokens it handed up; drafted, accepted: of what was proposed to it.
        histogram: rounds by number of accepted tokens.
    """

    name: str
    passes: int = 0
    seconds: float = 0.0
    rounds: int = 0
    emitted: int = 0
    drafted: int = 0
    accepted: int = 0
    histogram: list[int] = field(default_factory=list)

    def add(self, level: dict[str, Any]) -> None:
        """Add one call."""
        self.passes += level["forward_passes"]
        self.seconds += level["seconds"]
        self.rounds += level["rounds"]
        self.emitted += level["accepted"] + level["recovered"] + level["bonus"]
        self.drafted += level["drafted"]
        self.accepted += level["accepted"]
        counts = level["acceptance_histogram"]
        self.histogram += [0] * (len(counts) - len(self.histogram))
        for i, count in enumerate(counts):
            self.histogram[i] += count

    @property
    def mean_length(self) -> float | None:
        """Tokens emitted per check, recovered and bonus included."""
        return self.emitted / self.rounds if self.rounds else None


@dataclass
class Figures:
    """What one method did on one task, or over all.

    Attributes:
        groups: observations: batches of questions, all their turns together.
        tokens_per_second: mean over the groups.
        tokens, seconds: sums.
        mean_of_ratios, ratio_of_means: speed-ups over plain at the same batch size and temperature; None for plain's
            absence.
        mean_of_ratios_interval, ratio_of_means_interval: their 95 % bootstrap intervals, None below five groups.
        length: tokens of a row per pass of the target; None where passes were not counted.
        levels: of a chain.
        peak_bytes, rise_bytes: the largest.
        identical, compared: greedy answers equal to plain's, of those to the same prompt.
    """

    groups: int = 0
    tokens_per_second: float = 0.0
    tokens: int = 0
    seconds: float = 0.0
    mean_of_ratios: float | None = None
    ratio_of_means: float | None = None
    mean_of_ratios_interval: tuple[float, float] | None = None
    ratio_of_means_interval: tuple[float, float] | None = None
    length: float | None = None
    levels: list[LevelFigures] = field(default_factory=list)
    peak_bytes: int = 0
    rise_bytes: int = 0
    identical: int = 0
    compared: int = 0


@dataclass
class Table:
    """All figures of a run.

    Attributes:
        cells: by decoder, batch and temperature, then by task; `OVERALL` among the tasks.
        tasks: in Spec-Bench's order.
    """

    cells: dict[Key, dict[str, Figures]] = field(default_factory=dict)
    tasks: list[str] = field(default_factory=list)

    def keys(self, batch: int | None = None, temperature: float | None = None) -> list[Key]:
        """The rows of a batch size and temperature, in the order in which methods were given."""
        return [
            key
            for key in self.cells
            if (batch is None or key[1] == batch) and (temperature is None or key[2] == temperature)
        ]

    @property
    def settings(self) -> list[tuple[int, float]]:
        """Batch sizes and temperatures there are."""
        return sorted({(batch, temperature) for _, batch, temperature in self.cells})


def tabulate(records: Iterable[Line], order: Sequence[str] = ()) -> Table:
    """All figures of a run.

    Args:
        records: its answers.
        order: decoders in the order in which they are to be shown.

    Returns:
        The table.
    """
    listed = list(records)
    by_cell: dict[Key, dict[str, list[Line]]] = defaultdict(lambda: defaultdict(list))
    for line in listed:
        by_cell[_key(line)][line["task"]].append(line)
    there = {line["task"] for line in listed}
    table = Table(tasks=[*(t for t in TASKS if t in there), *sorted(there - set(TASKS))])
    counted = _identity(listed)
    places = {name: i for i, name in enumerate(order)}
    for key in sorted(by_cell, key=lambda k: (k[1], k[2], places.get(k[0], len(places)), k[0])):
        plain = by_cell.get((PLAIN, key[1], key[2]), {})
        pairs = {task: _pair(lines, plain.get(task, [])) for task, lines in by_cell[key].items()}
        cells = {}
        for task in table.tasks:
            if by_cell[key].get(task):
                cells[task] = _figures(by_cell[key][task], [pairs[task]])
                cells[task].identical, cells[task].compared = counted.get((*key, task), (0, 0))
        cells[OVERALL] = _overall([line for task in cells for line in by_cell[key][task]], list(pairs.values()), cells)
        table.cells[key] = cells
    return table


def _key(line: Line) -> Key:
    return line["decoder"], int(line["batch_size"]), float(line["temperature"])


def _speeds(lines: Iterable[Line]) -> dict[str, float]:
    """Tokens per second of every group, its turns together."""
    tokens: dict[str, int] = defaultdict(int)
    seconds: dict[str, float] = defaultdict(float)
    for line in lines:
        if line["row"] == 0:
            tokens[line["group"]] += line["group_tokens"]
            seconds[line["group"]] += line["seconds"]
    return {group: tokens[group] / seconds[group] for group in tokens if seconds[group] > 0 and tokens[group] > 0}


def _pair(ours: list[Line], plain: list[Line]) -> Pair:
    """Tokens per second of the method and of plain on the groups both answered, `[n]` each."""
    one, other = _speeds(ours), _speeds(plain)
    shared = [group for group in one if group in other]
    return np.array([one[g] for g in shared]), np.array([other[g] for g in shared])


def _figures(lines: list[Line], pairs: list[Pair]) -> Figures:
    firsts = [line for line in lines if line["row"] == 0]
    speeds = list(_speeds(lines).values())
    found = Figures(
        groups=len(speeds),
        tokens_per_second=float(np.mean(speeds)) if speeds else 0.0,
        tokens=sum(line["group_tokens"] for line in firsts),
        seconds=sum(line["seconds"] for line in firsts),
        peak_bytes=max(line["peak_bytes"] for line in firsts),
        rise_bytes=max(line["rise_bytes"] for line in firsts),
        levels=_levels(firsts),
    )
    # A pass of a batch serves every row: a row's share of it counts as one pass of that row.
    passes = sum((line["target_passes"] or 0) * line["batch_size"] for line in firsts)
    if found.levels:
        found.length = found.levels[0].mean_length
    elif passes:
        found.length = found.tokens / passes
    elif firsts and firsts[0]["decoder"].startswith(PLAIN):
        found.length = 1.0
    _speed_up(found, [pair for pair in pairs if len(pair[0])])
    return found


def _speed_up(found: Figures, pairs: list[Pair]) -> None:
    if not pairs:
        return
    found.mean_of_ratios = float(np.mean([mean_of_ratios(*pair) for pair in pairs]))
    found.ratio_of_means = float(np.mean([ratio_of_means(*pair) for pair in pairs]))
    strata = pairs
    if min(len(pair[0]) for pair in pairs) < MIN_QUESTIONS:
        # Too few of a task to resample inside it: all tasks are resampled as one.
        strata = [(np.concatenate([one for one, _ in pairs]), np.concatenate([other for _, other in pairs]))]
    for name, statistic in (("mean_of_ratios", mean_of_ratios), ("ratio_of_means", ratio_of_means)):
        limits = interval(statistic, strata, CONFIDENCE, RESAMPLES, BOOTSTRAP_SEED)
        setattr(found, f"{name}_interval", None if limits is None else (limits[0], limits[1]))


def _overall(lines: list[Line], pairs: list[Pair], cells: dict[str, Figures]) -> Figures:
    """The mean over the tasks: speeds and speed-ups are means of the tasks' figures, counts are sums."""
    found = _figures(lines, pairs)
    found.tokens_per_second = float(np.mean([cell.tokens_per_second for cell in cells.values()]))
    lengths = [cell.length for cell in cells.values() if cell.length is not None]
    found.length = float(np.mean(lengths)) if lengths else None
    found.identical = sum(cell.identical for cell in cells.values())
    found.compared = sum(cell.compared for cell in cells.values())
    return found


def _levels(firsts: list[Line]) -> list[LevelFigures]:
    found: list[LevelFigures] = []
    for line in firsts:
        for i, level in enumerate(line["levels"]):
            if i == len(found):
                found.append(LevelFigures(level["name"]))
            found[i].add(level)
    return found


def _identity(lines: list[Line], to: str = PLAIN) -> dict[tuple[Any, ...], tuple[int, int]]:
    """Greedy answers equal to those of decoder `to`, and all compared, by decoder, batch, temperature and task."""
    plain = {_answer(line): line for line in lines if line["decoder"] == to and line["temperature"] == 0}
    counts: dict[tuple[Any, ...], list[int]] = defaultdict(lambda: [0, 0])
    for line in lines:
        other = plain.get(_answer(line)) if line["temperature"] == 0 else None
        if other is not None and other["prompt_sha"] == line["prompt_sha"]:
            cell = (*_key(line), line["task"])
            count = counts[cell]
            count[0] += other["output_ids"] == line["output_ids"]
            count[1] += 1
    return {key: (same, all_) for key, (same, all_) in counts.items()}


def _answer(line: Line) -> tuple[Any, ...]:
    return line["batch_size"], line["group"], line["question_id"], line["turn"]


def identity_rates(lines: Iterable[Line], to: str = PLAIN) -> dict[str, tuple[int, int]]:
    """Of a run, for every decoder at batch 1: greedy answers equal to those of `to`, and all that were compared."""
    totals: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    for (decoder, batch, _, _), (same, compared) in _identity(list(lines), to).items():
        if batch == 1:
            totals[decoder][0] += same
            totals[decoder][1] += compared
    return {decoder: (same, compared) for decoder, (same, compared) in totals.items()}
