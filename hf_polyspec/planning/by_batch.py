# SPDX-License-Identifier: Apache-2.0
"""The best chain for every batch size: the same records, at the times of passes over several rows.

Rows are taken to run together and each like the recorded texts: a round of a level is one pass over the columns of all
rows, a draft without a model is made row by row, and prompts are read one after another. That the last rows of a batch
run alone is not in it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from rich import box
from rich.table import Table

from .candidates import Level, describe_chain, describe_sizes
from .costs import BATCHES, ModelCosts, Shape
from .replay import Measurements
from .search import Candidate, best_of_each, search
from .theory.cost_model import SecondsTable

SIZES = (1, *BATCHES)


@dataclass(frozen=True)
class AtBatch:
    """What a batch size makes of the chains.

    Attributes:
        rows: of the batch; best: the quickest of all chains, plain decoding included.
        each: the best sizes of every subset; tokens a second of one row.
    """

    rows: int
    best: Candidate
    each: list[Candidate]

    @property
    def plain(self) -> Candidate:
        """Plain decoding."""
        return next(one for one in self.each if one.chain.plain)

    def speed(self, candidate: Candidate) -> float:
        """Tokens a second of all rows together."""
        return self.rows * candidate.predicted.tokens_per_second

    def gain(self, candidate: Candidate) -> float:
        """Speed in that of plain decoding."""
        return candidate.predicted.tokens_per_second / self.plain.predicted.tokens_per_second


def best_by_batch(
    levels: Sequence[Level], measured: Measurements, candidates: Sequence[Candidate], sizes: Sequence[int] = SIZES
) -> list[AtBatch]:
    """The best chain at every batch size.

    Args:
        levels: the target first; measured: the records; candidates: predicted for one row, the quickest first.
        sizes: of batches, rising.
    """
    found = []
    for rows in sizes:
        predicted = list(candidates) if rows == 1 else search(levels, at_batch(measured, rows))
        found.append(AtBatch(rows, predicted[0], best_of_each(predicted)))
    return found


def at_batch(measured: Measurements, rows: int) -> Measurements:
    """The records with the times that a batch of so many rows would have."""
    costs = {place: _of_rows(of_level, rows) for place, of_level in measured.costs.items()}
    context = sum(len(text.prompt) + len(text.new) / 2 for text in measured.texts) / len(measured.texts)
    wider = {
        place: costs[place].table(context).seconds(1) / measured.table(place, context).seconds(1) for place in costs
    }
    drafts = {}
    for job, record in measured.drafts.items():
        # A drafter without a model goes from row to row; a head's and a tree's passes grow as those above them do.
        factor = wider[job[0]] if record.blind_first or job[2] is not None else float(rows)
        points = tuple((tokens, factor * seconds) for tokens, seconds in record.seconds.points)
        checking = None if record.checking is None else wider[job[0]] * record.checking
        drafts[job] = replace(record, seconds=SecondsTable(points), checking=checking)
    texts = [
        replace(text, first_seconds=rows * text.first_seconds, step_seconds=wider[0] * text.step_seconds)
        for text in measured.texts
    ]
    return replace(
        measured,
        costs=costs,
        drafts=drafts,
        texts=texts,
        noise_seconds=rows * measured.noise_seconds,
        _tables={},
    )


def _of_rows(costs: ModelCosts, rows: int) -> ModelCosts:
    """A model whose passes are over so many rows at once."""
    contexts = sorted({shape.context for shape, _ in costs.shapes})
    shapes = tuple(
        (Shape(tokens, 1, context), seconds)
        for context in contexts
        for tokens, seconds in costs.table(context, rows).points
    )
    one, many = costs.table(contexts[0]).seconds(1), costs.table(contexts[0], rows).seconds(1)
    drafting = costs.drafting
    if drafting is not None:
        drafting = SecondsTable(tuple((tokens, seconds * many / one) for tokens, seconds in drafting.points))
    reading = SecondsTable(tuple((ids, rows * seconds) for ids, seconds in costs.prefill.points))
    return ModelCosts(shapes, reading, drafting, costs.switch)


def batches_table(found: Sequence[AtBatch], names: Sequence[str]) -> Table:
    """A line for each batch size: the best chain, its sizes, its speed and that of plain decoding."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 2, 0, 0), pad_edge=False)
    for heading in ("rows", "best chain", "sizes"):
        table.add_column(heading, overflow="fold")
    for heading in ("tokens/s", "plain", "against\nplain"):
        table.add_column(heading, justify="right", no_wrap=True)
    for one in found:
        table.add_row(
            str(one.rows),
            describe_chain(one.best.chain, names).replace("[", r"\["),
            describe_sizes(one.best.chain),
            f"{one.speed(one.best):.1f}",
            f"{one.speed(one.plain):.1f}",
            f"{one.gain(one.best):.2f}x",
        )
    return table


def where_it_stops(found: Sequence[AtBatch]) -> str:
    """From which batch size on no chain pays, in a sentence."""
    paying = [one.rows for one in found if not one.best.chain.plain]
    if not paying:
        return "No chain of these assistants is expected to pay at any of these batch sizes."
    if paying[-1] == found[-1].rows:
        return f"A chain is expected to pay up to {found[-1].rows} rows at least."
    stops = next(one.rows for one in found if one.rows > paying[-1])
    return f"From {stops} rows on, plain decoding is expected to be the quickest."
