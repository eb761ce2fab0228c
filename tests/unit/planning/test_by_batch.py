# SPDX-License-Identifier: Apache-2.0
"""Chains by batch size: passes over all rows, drafts row by row, and where it stops to pay."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from hf_polyspec.levels.suffix import SuffixDrafter
from hf_polyspec.planning.agreement import Draft, DraftRecord
from hf_polyspec.planning.by_batch import AtBatch, at_batch, batches_table, best_by_batch, where_it_stops
from hf_polyspec.planning.candidates import Level
from hf_polyspec.planning.costs import ModelCosts, Shape
from hf_polyspec.planning.overheads import Overheads
from hf_polyspec.planning.replay import Measurements
from hf_polyspec.planning.search import search
from hf_polyspec.planning.texts import Text
from hf_polyspec.planning.theory.cost_model import SecondsTable

NEW = 48


def measured(flat: int, seconds_of_a_draft: float = 0.0) -> Measurements:
    """A target whose passes take 1 s up to `flat` columns and in proportion beyond, and a drafter that is right."""

    def seconds(columns: int) -> float:
        return max(1.0, columns / flat)

    shapes = [(Shape(k, 1, 16), seconds(k)) for k in (1, 2, 4, 8, 16, 32, 64)]
    shapes += [(Shape(k, b, 16), seconds(k * b)) for b in (2, 4, 8) for k in (1, 4, 8) if k * b <= 64]
    draft = Draft(np.zeros((NEW, 24)), np.full(NEW, 24.0), np.ones(NEW, dtype=np.bool_))
    record = DraftRecord([draft], SecondsTable.constant(seconds_of_a_draft))
    text = Text(list(range(16)), list(range(NEW)), 2.0, 1.0, 2.0 + NEW)
    costs = {0: ModelCosts(tuple(shapes), SecondsTable(((16, 2.0),)))}
    return Measurements(["target", "suffix"], [text], costs, {}, {(0, 1, None): record}, Overheads())


LEVELS = [Level("target", 0, torch.nn.Linear(1, 1), "model"), Level("suffix", 1, SuffixDrafter(), "drafter")]


def by_batch(records: Measurements) -> list[AtBatch]:
    return best_by_batch(LEVELS, records, search(LEVELS, records))


def test_a_pass_over_all_rows_is_as_wide_as_they_are_together() -> None:
    records = at_batch(measured(flat=16), 8)
    assert records.table(0, 16).seconds(1) == pytest.approx(1.0)
    assert records.table(0, 16).seconds(8) == pytest.approx(4.0)
    assert records.costs[0].reading(16) == pytest.approx(16.0), "prompts are read one after another"
    assert records.texts[0].step_seconds == pytest.approx(1.0)


def test_drafts_are_made_row_by_row() -> None:
    records = at_batch(measured(flat=16, seconds_of_a_draft=0.25), 4)
    assert records.drafts[0, 1, None].seconds.seconds(8) == pytest.approx(1.0)


def test_the_best_drafts_become_shorter_as_rows_fill_the_pass() -> None:
    found = by_batch(measured(flat=16))
    assert [one.rows for one in found] == [1, 2, 4, 8]
    drafts = [one.best.chain.draft for one in found]
    assert drafts == sorted(drafts, reverse=True)
    assert drafts[0] > drafts[-1]
    gains = [one.gain(one.best) for one in found]
    assert gains == sorted(gains, reverse=True)
    assert "up to 8 rows at least" in where_it_stops(found)


def test_where_it_stops_is_said() -> None:
    """Every column costs, and a draft as much as four of them."""
    records = measured(flat=4, seconds_of_a_draft=1.0)
    found = by_batch(records)
    assert not found[0].best.chain.plain
    assert found[-1].best.chain.plain
    first = next(one.rows for one in found if one.best.chain.plain)
    assert where_it_stops(found) == f"From {first} rows on, plain decoding is expected to be the quickest."
    assert "at any of these" in where_it_stops(found[-1:])


def test_the_table_has_a_line_for_each_size() -> None:
    found = by_batch(measured(flat=16))
    table = batches_table(found, ["target", "suffix"])
    assert table.row_count == 4
    cells = [list(column.cells) for column in table.columns]
    assert cells[0] == ["1", "2", "4", "8"]
    assert cells[1][0] == "suffix"
    assert all(cell.endswith("x") for cell in cells[5])
