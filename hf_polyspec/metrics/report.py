# SPDX-License-Identifier: Apache-2.0
"""A score report as a table in the terminal, as Markdown, and as JSON."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict

from rich.console import Console
from rich.table import Table

from .scoring import QualityRow, ScoreReport, TokenRow

SAMPLED_ALPHA = 0.01
"""False-alarm rate at which a two-sample test of sampled tokens is called a difference."""


def verdict(row: QualityRow, confidence: float) -> str:
    """What one row says at false-alarm rate 1 - confidence, in words."""
    if row.result.interval is None:
        return "too few questions"
    return "differs" if row.result.p_value <= 1 - confidence + 1e-12 else "same within noise"


def summary(report: ScoreReport) -> str:
    """How many rows differ, before and after allowing for the number of rows."""
    alpha = 1 - report.confidence
    judged = [row for row in report.quality if row.result.interval is not None]
    if not judged:
        return "No comparison has enough questions to be judged."
    alone = sum(verdict(row, report.confidence) == "differs" for row in judged)
    together = sum(row.adjusted_p <= alpha + 1e-12 for row in judged)
    return (
        f"{alone} of {len(judged)} comparisons differ at p <= {alpha:.2g}, where chance alone would make "
        f"about {alpha * len(judged):.1f} of them differ; {together} after Holm's correction."
    )


def to_markdown(report: ScoreReport) -> str:
    """The report as Markdown: two tables, then sources and notes."""
    parts = []
    for title, header, rows in _tables(report):
        lines = [f"## {title}", "", f"| {' | '.join(header)} |", f"|{' --- |' * len(header)}"]
        lines += ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
        parts.append("\n".join(lines))
    parts += ["\n".join(f"- {sentence}" for sentence in _sentences(report))]
    return "\n\n".join(part for part in parts if part) + "\n"


def to_json(report: ScoreReport) -> str:
    """The report as JSON, with every field of its rows."""
    fields = asdict(report)
    for row, source in zip(fields["quality"], report.quality, strict=True):
        row["verdict"] = verdict(source, report.confidence)
    fields["summary"] = summary(report)
    return json.dumps(fields, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def show(report: ScoreReport, console: Console) -> None:
    """Print the report.

    Args:
        report: what to print.
        console: where; nothing is read as markup, so texts of the user's come out as they are.
    """
    for title, header, rows in _tables(report):
        table = Table(title=title)
        for name in header:
            table.add_column(name, justify="left" if name in ("task", "method", "metric") else "right")
        for row in rows:
            table.add_row(*row)
        console.print(table)
    for sentence in _sentences(report):
        console.print(sentence, markup=False, highlight=False)


def _tables(report: ScoreReport) -> Iterator[tuple[str, list[str], list[list[str]]]]:
    if report.quality:
        level = f"{report.confidence:.0%} interval"
        header = ["task", "T", "metric", "n", report.baseline, "method", "score", "difference", level, "p"]
        yield "Quality", [*header, "verdict"], [_quality(row, report.confidence) for row in report.quality]
    if report.tokens:
        header = ["task", "T", "method", "answers", "identical", "p", "verdict"]
        yield f"Token ids against {report.baseline}", header, [_tokens(row) for row in report.tokens]


def _quality(row: QualityRow, confidence: float) -> list[str]:
    result = row.result
    interval = "-" if result.interval is None else "[{:+.2f}, {:+.2f}]".format(*result.interval)
    return [
        row.task,
        f"{row.temperature:g}",
        row.metric,
        str(result.n_questions),
        f"{result.baseline:.2f}",
        row.method,
        f"{result.method:.2f}",
        f"{result.difference:+.2f}",
        interval,
        f"{result.p_value:.3f}",
        verdict(row, confidence),
    ]


def _tokens(row: TokenRow) -> list[str]:
    start = [row.task, f"{row.temperature:g}", row.method, str(row.n_answers)]
    if row.p_value is not None:
        same = row.p_value > SAMPLED_ALPHA
        return [*start, "-", f"{row.p_value:.3f}", "same law within noise" if same else "differs"]
    if not row.first_differences:
        return [*start, f"{row.identical_rate:.1%}", "-", "identical"]
    question, turn, position = row.first_differences[0]
    found = f"differs, first at question {question}, turn {turn}, token {position}"
    return [*start, f"{row.identical_rate:.1%}", "-", found]


def _sentences(report: ScoreReport) -> list[str]:
    sentences = [summary(report)] if report.quality else []
    sentences += [f"{name}: {source}." for name, source in report.sources.items()]
    return sentences + report.notes
