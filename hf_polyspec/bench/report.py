# SPDX-License-Identifier: Apache-2.0
"""`report.html`, one file that needs nothing else, and the same tables as a Markdown page."""

from __future__ import annotations

import re
import shlex
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from ..storage.atomic import write_text
from ..telemetry.display import LEVEL_COLOURS
from .charts import Bar, bars, histogram, stack
from .methods import PACKED, PLAIN
from .questions import TITLES
from .rundata import RunData
from .statistics import OVERALL, Key
from .tables import View, headline, speed_up, views

TITLE = "Polybasic speculative decoding on Spec-Bench"
MOST_CHAINS = 3
"""Chains whose coloured texts are shown beside one another."""


def write_report(target: Path, runs: Sequence[RunData], texts: int = 2) -> None:
    """Write the report of one or several runs.

    Args:
        target: the file, or a folder that is to hold `report.html`.
        runs: what to show, one after another.
        texts: questions of each task whose texts are shown.
    """
    environment = Environment(
        loader=PackageLoader("hf_polyspec.bench"), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    page = environment.get_template("report.html.j2").render(
        title=TITLE,
        colours=list(LEVEL_COLOURS),
        runs=[_run_view(run, number, texts) for number, run in enumerate(runs)],
    )
    write_text(target / "report.html" if target.is_dir() else target, page)


def write_markdown(target: Path, runs: Sequence[RunData], title: str = "Benchmarks") -> None:
    """Write the tables of some runs as one Markdown page.

    Args:
        target: the file.
        runs: what to show, one after another.
        title: of the page.
    """
    parts = [f"# {title}", "Made by `polyspec bench`; nothing here is written by hand."]
    for number, run in enumerate(runs):
        parts += [f"## {run.title}", *_markdown_facts(run)]
        parts += [f"- {sentence}" for sentence in headline(run)]
        for view in views(run):
            if number and view.kind == "foreign":
                continue  # once is enough
            parts += [f"### {view.title}", view.note, _markdown_table(view)]
    text = "\n\n".join(parts).replace("\n\n- ", "\n- ")
    write_text(target, text + "\n")


def _run_view(run: RunData, number: int, texts: int) -> dict[str, Any]:
    tables = {view.name: view for view in views(run)}
    return {
        "id": f"run{number}",
        "title": run.title,
        "headline": headline(run),
        "facts": _facts(run),
        "main": [view for name, view in tables.items() if name.startswith("table2")],
        "paper": tables["paper"],
        "charts": list(_speed_charts(run)),
        "totals": tables["totals"],
        "histograms": list(_histograms(run)),
        "stacks": list(_stacks(run)),
        "levels": [tables[name] for name in ("levels", "kinds") if name in tables],
        "memory": tables["memory"],
        "identity": [tables[name] for name in ("identity", "ties", "unavailable") if name in tables],
        "texts": list(_texts(run, texts)),
    }


def _facts(run: RunData) -> list[tuple[str, str]]:
    found = [(f"started {start['date']}", start["environment"]) for start in run.starts]
    commands = dict.fromkeys(without_folders(start["command"]) for start in run.starts)
    found += [("command", command) for command in commands]
    processes = max((start["processes"] for start in run.starts), default=1)
    if processes > 1:
        found.append(("processes", f"{processes}, which share the machine while they are timed"))
    found += [
        (name, without_folders(_setting(value))) for name, value in run.settings.items() if value not in (None, [])
    ]
    return found


def without_folders(text: str) -> str:
    """A command or setting with the last part of absolute paths only: the folders are of one machine."""
    return re.sub(r"(^|(?<=[\s='\"]))/(?:[^\s/'\"]+/)*([^\s/'\"]+)/?", r"\2", text)


def folded(command: str, width: int = 88) -> str:
    """A command on lines that a page shows whole; a list between quotes goes on on the next line, as shells allow."""
    lines = [""]
    for word in (part for quoted in shlex.split(command) for part in _parts(shlex.quote(quoted), width)):
        if lines[-1] and len(lines[-1]) + len(word) > width:
            lines[-1] += "\\"
            lines.append("    ")
        lines[-1] += word + " "
    return "\n".join(lines).rstrip()


def _parts(word: str, width: int) -> list[str]:
    return [word] if len(word) <= width else ["\n    ".join(textwrap.wrap(word, width, break_long_words=False))]


def _setting(value: Any) -> str:
    return ", ".join(str(part) for part in value) if isinstance(value, list) else str(value)


def _speed_charts(run: RunData) -> Iterator[dict[str, Any]]:
    """For every batch size and temperature: speed-ups of all methods, over all tasks and task by task."""
    for batch, temperature in run.table.settings:
        keys = [key for key in run.table.keys(batch, temperature) if key[0] != PLAIN]
        mode = "greedy" if temperature == 0 else f"temperature {temperature:g}"
        panels = []
        for task in [OVERALL, *run.table.tasks]:
            chosen = [_bar(run, key, task) for key in keys]
            name = "All tasks" if task == OVERALL else TITLES.get(task, task)
            drawn = [bar for bar in chosen if bar is not None]
            if drawn:
                panels.append((name, Markup(bars(drawn, f"Speed-up over plain generate(), {name}"))))
        if panels:
            yield {"title": f"batch {batch}, {mode}", "panels": panels}


def _bar(run: RunData, key: Key, task: str) -> Bar | None:
    cell = run.table.cells[key].get(task)
    if cell is None or cell.mean_of_ratios is None:
        return None
    kind = "peer" if key[0].startswith("hf:") or key[0] == PACKED else "chain"
    text = speed_up(cell.mean_of_ratios, cell.mean_of_ratios_interval)
    return Bar(key[0], text, cell.mean_of_ratios, cell.mean_of_ratios_interval, kind)


def _title(key: Key) -> str:
    decoder, batch, temperature = key
    return (
        decoder + (f", batch {batch}" if batch > 1 else "") + (f", temperature {temperature:g}" if temperature else "")
    )


def _histograms(run: RunData) -> Iterator[dict[str, Any]]:
    for key in run.table.cells:
        levels = run.table.cells[key][OVERALL].levels
        panels = []
        for i, level in enumerate(levels[:-1] if len(levels) > 1 else levels):
            name = f"{level.name} checks {levels[i + 1].name}" if i + 1 < len(levels) else level.name
            length = "" if level.mean_length is None else f", {level.mean_length:.2f} tokens a check"
            drawing = histogram(level.histogram, f"Accepted tokens per check: {name}", i % len(LEVEL_COLOURS))
            panels.append((f"{name}{length}", Markup(drawing)))
        if panels:
            yield {"title": _title(key), "panels": panels}


def _stacks(run: RunData) -> Iterator[dict[str, Any]]:
    for key in run.table.cells:
        cell = run.table.cells[key][OVERALL]
        if cell.levels and cell.seconds:
            shares = [
                (level.name, level.seconds / cell.seconds, f"level-{i % len(LEVEL_COLOURS)}")
                for i, level in enumerate(cell.levels)
            ]
            rest = max(0.0, 1 - sum(share for _, share, _ in shares))
            shares.append(("between the levels", rest, "rest"))
            yield {
                "title": _title(key),
                "drawing": Markup(stack(shares, f"Where the time of {_title(key)} went")),
                "legend": [(name, f"{share:.1%}", kind) for name, share, kind in shares],
            }


def _texts(run: RunData, texts: int) -> Iterator[dict[str, Any]]:
    """The first questions of each task, answered by the longest chains, greedy where there is greedy."""
    temperatures = sorted({line["temperature"] for line in run.records if line.get("pieces")})
    lines = [
        line
        for line in run.records
        if line.get("pieces") and line["batch_size"] == 1 and line["temperature"] == temperatures[0]
    ]
    names = {line["method"]: [level["name"] for level in line["levels"]] for line in lines}
    shown = sorted(names, key=lambda name: -len(names[name]))[:MOST_CHAINS]
    for task in run.table.tasks:
        mine = [line for line in lines if line["task"] == task and line["method"] in shown]
        for question in list(dict.fromkeys(line["question_id"] for line in mine))[:texts]:
            answers = [
                {
                    "method": line["method"] + (f", turn {line['turn'] + 1}" if line["turn"] else ""),
                    "legend": list(enumerate(names[line["method"]])),
                    "pieces": [(level % len(LEVEL_COLOURS), text) for level, text in line["pieces"]],
                }
                for name in shown
                for line in mine
                if line["question_id"] == question and line["method"] == name
            ]
            yield {"title": f"{TITLES.get(task, task)}, question {question}", "answers": answers}


def _markdown_facts(run: RunData) -> list[str]:
    found = []
    for start in run.starts:
        found.append(f"{start['environment']}\n\n```bash\n{folded(without_folders(start['command']))}\n```")
    return list(dict.fromkeys(found))


def _markdown_table(view: View) -> str:
    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " / ") for cell in cells) + " |"

    marks = "| --- |" + " ---: |" * (len(view.header) - 1)
    return "\n".join([line(view.header), marks, *(line(row) for row in view.rows)])
