# SPDX-License-Identifier: Apache-2.0
"""Answer quality of every decoding method beside plain decoding, on the same questions.

The claim under test is that speculative decoding leaves quality alone: differences within noise, greedy
token ids equal, sampled ones drawn from the same law.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from . import module_path
from .comparison import Array, Difference, compare, holm
from .records import Record
from .scorers import SCORERS, MetricUnavailableError, Scorer

Question: TypeAlias = tuple[str, int]
"""Question id and turn."""
Answers: TypeAlias = dict[Question, list[Record]]
"""All answers of one method to one task at one temperature; several where it was sampled repeatedly."""

ALL_TASKS = "all tasks"


@dataclass(frozen=True)
class QualityRow:
    """One metric of one method beside the baseline; `adjusted_p` is Holm's over all rows of the report."""

    task: str
    temperature: float
    method: str
    metric: str
    result: Difference
    adjusted_p: float = 1.0


@dataclass(frozen=True)
class TokenRow:
    """Whether one method's token ids are the baseline's.

    Attributes:
        task: of the questions, or `ALL_TASKS`.
        temperature: 0 compares ids one by one, above 0 the laws of sampled ids.
        method: compared with the baseline.
        n_answers: question turns compared.
        identical_rate: share with equal ids; greedy only.
        first_differences: (question id, turn, position) of each answer that differs; greedy only.
        p_value: of the two-sample test; sampled only.
    """

    task: str
    temperature: float
    method: str
    n_answers: int
    identical_rate: float | None = None
    first_differences: tuple[tuple[str, int, int], ...] = ()
    p_value: float | None = None


@dataclass
class ScoreReport:
    """What `score_records` found.

    Attributes:
        baseline: the method the others were compared with.
        confidence: of the intervals; differences are tested at 1 - confidence.
        quality: one row per task, temperature, method and metric.
        tokens: one row per task, temperature and method.
        sources: what computed each family of metrics.
        notes: what could not be scored or was left out, in sentences.
    """

    baseline: str
    confidence: float
    quality: list[QualityRow] = field(default_factory=list)
    tokens: list[TokenRow] = field(default_factory=list)
    sources: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def score_records(
    records: Sequence[Record],
    baseline: str = "plain",
    modules: Path | None = None,
    confidence: float = 0.95,
    n_resamples: int = 2000,
    seed: int = 0,
) -> ScoreReport:
    """Compare every method with the baseline, task by task and temperature by temperature.

    Args:
        records: of all methods, the baseline among them.
        baseline: name of the method the others are compared with.
        modules: folder with local copies of `evaluate`'s modules, for machines without network.
        confidence: of the intervals.
        n_resamples: of bootstrap and randomisation.
        seed: of both.

    Returns:
        The report.

    Raises:
        ValueError: when the baseline or anything to compare with it is missing, or an option is out of range.
    """
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must lie between 0 and 1, not {confidence}.")
    if n_resamples < 100:
        raise ValueError(f"n_resamples must be at least 100, not {n_resamples}.")
    methods = list(dict.fromkeys(record.method for record in records))
    if baseline not in methods:
        raise ValueError(f"No record is of the baseline {baseline!r}; there are {', '.join(methods)}.")
    if len(methods) == 1:
        raise ValueError(f"All records are of {baseline!r}; there is nothing to compare it with.")
    report = ScoreReport(baseline, confidence)
    cells = _by_cell(records)
    scorers = _find_scorers(cells, modules, report)
    options = {"confidence": confidence, "n_resamples": n_resamples, "seed": seed}
    for (task, temperature), answers in cells.items():
        if baseline not in answers:
            report.notes.append(f"{task}, temperature {temperature:g}: no {baseline} answers, not compared.")
            continue
        _score_cell(task, temperature, answers, scorers.get(task), report, options)
    _compare_all_tokens(cells, report, seed)
    _adjust(report)
    return report


def _by_cell(records: Sequence[Record]) -> dict[tuple[str, float], dict[str, Answers]]:
    cells: dict[tuple[str, float], dict[str, Answers]] = {}
    for record in records:
        answers = cells.setdefault((record.task, record.temperature), {}).setdefault(record.method, {})
        answers.setdefault((record.question_id, record.turn), []).append(record)
    return cells


def _find_scorers(
    cells: Mapping[tuple[str, float], Any], modules: Path | None, report: ScoreReport
) -> dict[str, Scorer]:
    """One scorer a task; tasks of one kind share it, so that nothing is loaded twice."""
    scorers: dict[str, Scorer] = {}
    built: dict[Any, Scorer] = {}
    for task in dict.fromkeys(task for task, _ in cells):
        build = SCORERS.get(task)
        if build is None:
            report.notes.append(
                f"{task}: no metric compares it with references (a judge would); only token ids are compared."
            )
            continue
        try:
            scorers[task] = built[build] if build in built else built.setdefault(build, build(modules))
        except MetricUnavailableError as error:
            report.notes.append(f"{task}: not scored. {error}")
            continue
        report.sources[scorers[task].name] = scorers[task].source
    return scorers


def _score_cell(
    task: str,
    temperature: float,
    answers: dict[str, Answers],
    scorer: Scorer | None,
    report: ScoreReport,
    options: dict[str, Any],
) -> None:
    where = f"{task}, temperature {temperature:g}"
    plain = answers[report.baseline]
    references = {question: _references(question, answers) for question in plain}
    usable = {q for q in plain if scorer is not None and scorer.usable(references[q])}
    if scorer is not None and len(usable) < len(plain):
        report.notes.append(f"{where}: {len(plain) - len(usable)} of {len(plain)} answers have no usable reference.")
    known: dict[tuple[str, Question], list[float]] = {}
    for method, theirs in answers.items():
        if method == report.baseline:
            continue
        missing = len(plain.keys() ^ theirs.keys())
        if missing:
            report.notes.append(
                f"{where}: {missing} answers are only in one of {report.baseline} and {method}, left out."
            )
        shared = [question for question in plain if question in theirs and question in usable]
        if scorer is None or not shared:
            continue
        sides = [
            _statistics([side[question] for question in shared], shared, references, scorer, known)
            for side in (plain, theirs)
        ]
        for metric, combine in scorer.rows.items():
            result = compare(sides[0], sides[1], combine, **options)
            report.quality.append(QualityRow(task, temperature, method, metric, result))


def _references(question: Question, answers: dict[str, Answers]) -> tuple[str, ...]:
    """The question's references, from whichever record has them."""
    found = (record.references for side in answers.values() for record in side.get(question, ()))
    return next((references for references in found if references), ())


def _statistics(
    answers: Sequence[Sequence[Record]],
    questions: Sequence[Question],
    references: Mapping[Question, Sequence[str]],
    scorer: Scorer,
    known: dict[tuple[str, Question], list[float]],
) -> Array:
    """Sufficient statistics `[Q, S]`, averaged over the samples of a question; equal texts measured once."""
    rows = []
    for question, samples in zip(questions, answers, strict=True):
        for sample in samples:
            key = (sample.output, question)
            if key not in known:
                known[key] = scorer.measure(sample.output, references[question])
        rows.append(np.mean([known[sample.output, question] for sample in samples], axis=0))
    return np.asarray(rows, dtype=np.float64)


def _compare_all_tokens(cells: Mapping[tuple[str, float], dict[str, Answers]], report: ScoreReport, seed: int) -> None:
    try:
        import evaluate
    except ImportError:
        report.notes.append("Token ids were not compared: this needs the package evaluate: pip install evaluate.")
        return
    load = partial(evaluate.load, module_path("losslessness"), keep_in_memory=True)
    pooled: dict[tuple[float, str], list[tuple[Question, list[Record], list[Record]]]] = defaultdict(list)
    loaded = {kind: load(kind) for kind in ("default", "samples")}
    tasks: dict[tuple[float, str], list[str]] = defaultdict(list)
    for (task, temperature), answers in cells.items():
        plain = answers.get(report.baseline, {})
        for method, theirs in answers.items():
            pairs = [(question, theirs[question], plain[question]) for question in plain if question in theirs]
            if method == report.baseline or not pairs:
                continue
            report.tokens.append(_compare_tokens(task, temperature, method, pairs, loaded, seed))
            pooled[temperature, method] += pairs
            tasks[temperature, method].append(task)
    for (temperature, method), pairs in pooled.items():
        if len(tasks[temperature, method]) > 1:
            report.tokens.append(_compare_tokens(ALL_TASKS, temperature, method, pairs, loaded, seed))


def _compare_tokens(
    task: str,
    temperature: float,
    method: str,
    pairs: Sequence[tuple[Question, list[Record], list[Record]]],
    loaded: Mapping[str, Any],
    seed: int,
) -> TokenRow:
    if temperature > 0:
        samples = [[[list(r.output_ids) for r in side] for side in (ours, plain)] for _, ours, plain in pairs]
        found = loaded["samples"].compute(
            predictions=[ours for ours, _ in samples], references=[plain for _, plain in samples], seed=seed
        )
        return TokenRow(task, temperature, method, len(pairs), p_value=found["p_value"])
    found = loaded["default"].compute(
        predictions=[list(ours[0].output_ids) for _, ours, _ in pairs],
        references=[list(plain[0].output_ids) for _, _, plain in pairs],
    )
    differing = tuple(
        (*question, position)
        for (question, _, _), position in zip(pairs, found["first_difference"], strict=True)
        if position is not None
    )
    return TokenRow(task, 0.0, method, len(pairs), found["identical_rate"], differing)


def _adjust(report: ScoreReport) -> None:
    adjusted = holm([row.result.p_value for row in report.quality])
    report.quality = [
        QualityRow(row.task, row.temperature, row.method, row.metric, row.result, p)
        for row, p in zip(report.quality, adjusted, strict=True)
    ]
