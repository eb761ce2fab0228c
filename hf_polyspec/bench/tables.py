# SPDX-License-Identifier: Apache-2.0
"""The tables of a report, as text: the HTML page and the Markdown page show the same."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from .breakdown import KINDS, TOKENS
from .methods import PACKED, PLAIN
from .paper import COLUMNS, LARGER, SOURCE, TABLE_2
from .questions import TITLES
from .rundata import RunData
from .statistics import OVERALL, Figures, Key

MOST_TIES = 60
NONE = "-"


@dataclass(frozen=True)
class View:
    """A table to show.

    Attributes:
        name: an identifier; title: a heading; note: what to know when reading it.
        header: of the columns; rows: cells, the first of each names the row. A line break parts a cell in two.
        kind: "measured", "foreign" for numbers that were not measured here, or "words".
    """

    name: str
    title: str
    note: str
    header: list[str]
    rows: list[list[str]] = field(default_factory=list)
    kind: str = "measured"


def views(run: RunData) -> Iterator[View]:
    """All tables of a run, in the order in which they are shown."""
    for batch, temperature in run.table.settings:
        if batch == 1:
            yield table_2(run, batch, temperature)
    yield published()
    yield totals(run)
    yield levels(run)
    if run.breakdown:
        yield kinds(run)
    yield memory(run)
    yield identity(run)
    if run.ties:
        yield ties(run)
    if run.unavailable:
        rows = [[name, reason] for name, reason in run.unavailable.items()]
        yield View("unavailable", "Not applicable", "Methods that cannot run so.", ["method", "why"], rows, "words")


def table_2(run: RunData, batch: int, temperature: float) -> View:
    """The paper's Table 2 with our numbers: speed-up and tokens per target pass, task by task."""
    table = run.table
    header = ["method", *(TITLES.get(task, task) for task in table.tasks), "Overall"]
    rows = []
    for key in table.keys(batch, temperature):
        cells = table.cells[key]
        rows.append([key[0], *(_pair(cells.get(task)) for task in [*table.tasks, OVERALL])])
    note = (
        "In each cell: speed-up over plain generate() (mean of per-question ratios), and below it the tokens emitted "
        "per pass of the target. Overall is the mean over the tasks."
    )
    return View(f"table2-t{temperature:g}", f"Speed-up and acceptance length, {_mode(temperature)}", note, header, rows)


def published() -> View:
    """The paper's own numbers, marked as such."""
    header = ["method", *(TITLES.get(column, "Overall") for column in COLUMNS)]
    rows = [
        [f"{row.model}: {row.method}", *(f"{speed_up:.2f}x\n{length:.2f}" for speed_up, length in row.cells)]
        for row in TABLE_2
    ]
    return View("paper", "The paper's published numbers", f"{SOURCE} {LARGER}", header, rows, kind="foreign")


def totals(run: RunData) -> View:
    """Speeds and both speed-ups with intervals, for every batch size and temperature."""
    header = ["method", "batch", "T", "tokens/s", "mean of ratios", "ratio of means", "tokens per target pass", "n"]
    rows = []
    for key in run.table.cells:
        cell = run.table.cells[key][OVERALL]
        rows.append(
            [
                key[0],
                str(key[1]),
                f"{key[2]:g}",
                f"{cell.tokens_per_second:.1f}",
                speed_up(cell.mean_of_ratios, cell.mean_of_ratios_interval),
                speed_up(cell.ratio_of_means, cell.ratio_of_means_interval),
                _number(cell.length),
                str(cell.groups),
            ]
        )
    note = (
        "Means over the tasks. Speed-ups are over plain generate() at the same batch size and temperature, on the same "
        "prompts; brackets hold 95 % bootstrap intervals, questions resampled inside each task where it has five. "
        "Tokens per second are of the whole batch, the prompt's pass included. n counts prompts, or batches of them."
    )
    return View("totals", "Speed", note, header, rows)


def levels(run: RunData) -> View:
    """Where the time of each chain went, and how long its levels' acceptances are."""
    header = ["method", "level", "passes", "ms a pass", "share of time", "accepted", "mean acceptance length"]
    rows = []
    for key in run.table.cells:
        cell = run.table.cells[key][OVERALL]
        for i, level in enumerate(cell.levels):
            rows.append(
                [
                    _name(key) if i == 0 else "",
                    f"{i} {level.name}",
                    str(level.passes),
                    f"{1000 * level.seconds / level.passes:.2f}" if level.passes else NONE,
                    f"{level.seconds / cell.seconds:.1%}" if cell.seconds else NONE,
                    f"{level.accepted / level.drafted:.1%}" if level.drafted else NONE,
                    _number(level.mean_length),
                ]
            )
    note = (
        "Time of a level is its own, those below it excluded; what is missing to 100 % is spent between levels. "
        "Accepted is the share of the tokens proposed to a level that it kept (for a drafter, of those it proposed)."
    )
    return View("levels", "Levels of the chains", note, header, rows)


def kinds(run: RunData) -> View:
    """The time of one answer by level and kind of work."""
    header = ["method", "level", *KINDS]
    rows = [
        [name if place == 0 else "", level, *(f"{shares[kind]:.1%}" for kind in KINDS)]
        for name, by_level in run.breakdown.items()
        for place, (level, shares) in enumerate(by_level.items())
    ]
    note = (
        f"Shares of the time of one answer of at most {TOKENS} tokens under torch's profiler, which makes small "
        "operations and Python look longer than they are; for finding what to make faster, not for comparing speeds."
    )
    return View("kinds", "Kinds of work", note, header, rows)


def memory(run: RunData) -> View:
    """Weights of each method, and what a call needs above what was held before it."""
    header = ["method", "weights", "above them in a call", "largest peak"]
    weights = run.facts.get("weights", {})
    where = "process" if run.facts["device"] == "cpu" else "device"
    rows = []
    for key in run.table.cells:
        cell = run.table.cells[key][OVERALL]
        held = weights.get(key[0])
        rows.append([_name(key), _mib(held), _mib(cell.rise_bytes), _mib(cell.peak_bytes)])
    note = (
        f"All models of the run are in memory at once, so the largest peak of the {where} is that of the run; what a "
        "method needs by itself is its weights and what a call adds. Layouts made on the first pass (packed copies) "
        "count to neither."
    )
    return View("memory", "Memory", note, header, rows)


def identity(run: RunData) -> View:
    """How often a greedy answer is plain's, in the run's dtype and in float32."""
    dtype = run.facts["dtype"]
    in_float32 = dtype == "float32"
    header = ["method", f"identical in {dtype}", *([] if in_float32 else ["identical in float32"]), "not a tie"]
    header += [f"identical to {PACKED}"] if run.packed_rates else []
    rows = []
    for key in run.table.keys(temperature=0.0):
        decoder, batch, _ = key
        if decoder == PLAIN:
            continue
        cell = run.table.cells[key][OVERALL]
        more = run.float32_rates.get(decoder) if batch == 1 else None
        label = decoder if batch == 1 else f"{decoder}{',' if '@' in decoder else '@'}batch={batch}"
        real = [tie for tie in run.ties if tie["method"] == label and not tie["tie"]]
        row = [_name(key), _rate(cell.identical, cell.compared)]
        row += [] if in_float32 else [_rate(*more) if more else NONE]
        row.append(str(len(real)))
        if run.packed_rates:
            same = run.packed_rates.get(decoder) if batch == 1 and decoder != PACKED else None
            row.append(_rate(*same) if same else NONE)
        rows.append(row)
    note = (
        "Greedy answers equal to plain generate()'s at the same batch size, token for token, of those to the same "
        "prompt (a second turn follows the method's own first answer). A pass over several tokens and a pass over one "
        "round differently, so a difference must be a tie of two logits; any that is not is counted."
    )
    if run.packed_rates:
        note += " Our chains run on the packed target; the last column compares with plain generation on that one."
    return View("identity", "The same text", note, header, rows)


def ties(run: RunData) -> View:
    """Every difference with its two logits."""
    header = ["method", "question", "token", "plain", "method's", "logits", "apart", "tie within"]
    rows = []
    for tie in run.ties[:MOST_TIES]:
        logits = NONE if tie["logits"] is None else "{:.4f}\n{:.4f}".format(*tie["logits"])
        rows.append(
            [
                f"{tie['method']}, {tie['dtype']}",
                f"{tie['question_id']}, turn {tie['turn'] + 1}",
                str(tie["position"]),
                repr(tie["texts"][0]),
                repr(tie["texts"][1]),
                logits,
                NONE if tie["gap"] is None else f"{tie['gap']:.2g}",
                NONE if tie["tolerance"] is None else f"{tie['tolerance']:.2g}" + ("" if tie["tie"] else " NO TIE"),
            ]
        )
    more = f" The first {MOST_TIES} of {len(run.ties)}." if len(run.ties) > MOST_TIES else ""
    note = f"The place where each differing answer leaves plain's, and the target's two logits there.{more}"
    return View("ties", "Differences", note, header, rows)


def headline(run: RunData) -> list[str]:
    """What the run says, in sentences."""
    found = []
    for batch, temperature in run.table.settings:
        keys = [key for key in run.table.keys(batch, temperature) if not key[0].startswith(PLAIN)]
        for what, mine in (
            ("The fastest chain", [key for key in keys if not key[0].startswith("hf:")]),
            ("The best of transformers' assisted generation", [key for key in keys if key[0].startswith("hf:")]),
        ):
            best = max(mine, key=lambda key: run.table.cells[key][OVERALL].mean_of_ratios or 0.0, default=None)
            if best is not None:
                cell = run.table.cells[best][OVERALL]
                figure = speed_up(cell.mean_of_ratios, cell.mean_of_ratios_interval)
                found.append(f"{what} at batch {batch}, {_mode(temperature)}: {best[0]}, {figure} plain generate().")
    return found


def speed_up(value: float | None, interval: tuple[float, float] | None) -> str:
    """A speed-up with its interval."""
    if value is None:
        return NONE
    return f"{value:.2f}x" + ("" if interval is None else f" [{interval[0]:.2f}, {interval[1]:.2f}]")


def _pair(cell: Figures | None) -> str:
    if cell is None or cell.mean_of_ratios is None:
        return NONE
    return f"{cell.mean_of_ratios:.2f}x\n{_number(cell.length)}"


def _mode(temperature: float) -> str:
    return "greedy" if temperature == 0 else f"sampling at temperature {temperature:g}"


def _name(key: Key) -> str:
    return key[0] + (f", batch {key[1]}" if key[1] > 1 else "") + (f", T {key[2]:g}" if key[2] else "")


def _number(value: float | None) -> str:
    return NONE if value is None else f"{value:.2f}"


def _rate(same: int, compared: int) -> str:
    return f"{same} of {compared} ({same / compared:.0%})" if compared else NONE


def _mib(count: int | None) -> str:
    return NONE if count is None else f"{count / 2**20:,.0f} MiB"
