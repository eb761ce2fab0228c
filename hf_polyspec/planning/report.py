# SPDX-License-Identifier: Apache-2.0
"""A plan as a person reads it: the table of candidates, the choice, and what was left out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rich import box
from rich.console import Console, ConsoleOptions, RenderResult
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from .candidates import describe_chain, describe_sizes
from .planner import Planned
from .search import Candidate, best_of_each

_NUMBERS = ("tokens/\nround", "predicted\ntokens/s", "against\nplain")
_MEASURED = ("measured\ntokens/s", "error as\nplanned", "error\nanew")
_GAP = "  "


@dataclass(frozen=True)
class _Row:
    """A candidate: its mark, its levels, its sizes, its numbers."""

    mark: str
    chain: str
    sizes: str
    numbers: tuple[str, ...]


class CandidatesTable:
    """A table for a rich console: a line a candidate where that fits, else its names above its numbers.

    Args:
        rows: the candidates; headings: of the numbers, each of two lines.
    """

    def __init__(self, rows: Sequence[_Row], headings: Sequence[str]) -> None:
        self._rows, self._headings = rows, headings

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        table = self._table()
        # Names are the only column that could give way, and a name in pieces of a few letters cannot be read.
        if Measurement.get(console, options.update(width=10_000), table).maximum <= options.max_width:
            yield table
        else:
            yield from self._lines()

    def _table(self) -> Table:
        table = Table(box=box.SIMPLE_HEAD, padding=(0, 2, 0, 0), pad_edge=False)
        for heading in ("", "chain", "sizes"):
            table.add_column(heading, no_wrap=True)
        for heading in self._headings:
            table.add_column(heading, justify="right", no_wrap=True)
        for row in self._rows:
            table.add_row(row.mark, row.chain.replace("[", r"\["), row.sizes, *row.numbers)
        return table

    def _lines(self) -> Iterator[Text]:
        """Every candidate on two lines: as wide as its numbers, and names are broken between words."""
        widths = [
            max(map(len, (*heading.split("\n"), *(row.numbers[i] for row in self._rows))))
            for i, heading in enumerate(self._headings)
        ]

        def aligned(cells: Sequence[str]) -> str:
            return _GAP + _GAP.join(cell.rjust(width) for cell, width in zip(cells, widths, strict=True))

        for part in (0, 1):
            yield Text(aligned([heading.split("\n")[part] for heading in self._headings]), style="bold")
        yield Text("   chain: sizes", style="bold")
        for row in self._rows:
            yield Text(f" {row.mark or ' '} {row.chain}: {row.sizes}")
            yield Text(aligned(row.numbers))


def candidates_table(planned: Planned, more: int = 0) -> CandidatesTable:
    """The best sizes of every subset, the quickest first, the choice marked.

    Args:
        planned: the search; more: how many further candidates to show.
    """
    ran = any(c.measured is not None for c in planned.candidates)
    plain = planned.plain.predicted.tokens_per_second
    rows = []
    for candidate in shown(planned, more):
        speed = candidate.predicted.tokens_per_second
        numbers = [f"{candidate.predicted.length:.2f}", f"{speed:.1f}", f"{speed / plain:.2f}x"]
        rows.append(
            _Row(
                "*" if candidate is planned.best else "",
                describe_chain(candidate.chain, planned.measured.names),
                describe_sizes(candidate.chain),
                (*numbers, *(measured_cells(candidate) if ran else ())),
            )
        )
    return CandidatesTable(rows, _NUMBERS + _MEASURED if ran else _NUMBERS)


def measured_cells(candidate: Candidate) -> list[str]:
    """What was measured, and both predictions' errors in percent; empty where there is nothing.

    Returns:
        Measured tokens/s, the error of the prediction planned with, and that of the one from times taken between the
        runs.
    """
    if candidate.measured is None or candidate.planned_error is None:
        return [""] * 3
    cells = [f"{candidate.measured:.1f}", f"{100 * candidate.planned_error:+.1f} %"]
    anew = "" if candidate.anew is None or candidate.error is None else f"{100 * candidate.error:+.1f} %"
    return [*cells, anew]


def shown(planned: Planned, more: int = 0) -> list[Candidate]:
    """What a table shows: the best of every subset, everything that was run, and `more` of the rest, in order."""
    wanted = {id(c) for c in best_of_each(planned.candidates)}
    wanted |= {id(c) for c in planned.candidates if c.measured is not None}
    rest = [id(c) for c in planned.candidates if id(c) not in wanted]
    wanted |= set(rest[:more])
    return [c for c in planned.candidates if id(c) in wanted]


def _against(expected: Candidate, best: Candidate, names: Sequence[str]) -> str:
    """How the candidate that was expected to be the quickest did beside the one that was."""
    if expected is best:
        return "as predicted"
    named = f"{describe_chain(expected.chain, names)} ({describe_sizes(expected.chain)})"
    if expected.measured is None or best.measured is None:
        return f"{named} was expected to be"
    return f"{named} was expected to be, and was {100 * (1 - expected.measured / best.measured):.1f} % slower"


def sentences(planned: Planned) -> list[str]:
    """The choice, what was left out and why, and what does not fit."""
    names, best, plain = planned.measured.names, planned.best, planned.plain
    found = []
    if best.chain.plain:
        found.append("Best: plain generate(); no chain of these assistants is expected to be quicker here.")
    else:
        ratio = best.predicted.tokens_per_second / plain.predicted.tokens_per_second
        found.append(
            f"Best: {describe_chain(best.chain, names)} ({describe_sizes(best.chain)}), predicted "
            f"{best.predicted.tokens_per_second:.1f} tokens/s, {ratio:.2f} times plain generate()."
        )
    if best.measured is not None:
        found.append(f"It is the quickest of those that were run, {_against(planned.expected, best, names)}.")
    found += [f"{one.sentence[0].upper()}{one.sentence[1:]}" for one in planned.dropped]
    fakes = [level.name for level in planned.levels if getattr(level.member, "synthetic", False)]
    found += [
        f"SYNTHETIC: {name} accepts at a set rate; its speeds are of a schedule, not of a drafter." for name in fakes
    ]
    return found
