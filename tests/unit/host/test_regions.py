# SPDX-License-Identifier: Apache-2.0
"""Regions of rows that grow, shrink, come and go: none lies in another's, and what a row holds moves with it."""

from __future__ import annotations

import itertools
import random
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_models import tiny

from hf_polyspec.exactness.context import Context, Prompt
from hf_polyspec.host import ragged_cache
from hf_polyspec.host.manners import runner_for
from hf_polyspec.host.ragged import RaggedRunner
from hf_polyspec.host.ragged_cache import ALIGNED, RaggedCache, RaggedLayer, Regions
from hf_polyspec.telemetry.counters import LevelStats

WINDOW = 8


class Columns:
    """A cache of two layers, one with a window, whose columns say which row's and which position's they are."""

    def __init__(self) -> None:
        self.cache = RaggedCache(0, SimpleNamespace())
        self.cache.regions = {None: Regions(0), WINDOW: Regions(0, WINDOW)}
        for regions in self.cache.regions.values():
            layer = RaggedLayer(regions)
            layer.fit(torch.zeros(1, 1, 0, 1), torch.zeros(1, 1, 0, 1))
            self.cache.layers.append(layer)
        self.names: list[int] = []
        self.lengths: list[int] = []

    def write(self, row: int, held: int, end: int) -> None:
        held = self.cache.usable(row, held)
        self.cache.reserve(row, held, end)
        self.cache.fit()
        for layer in self.cache.ragged_layers:
            for position in range(held, end):
                layer.keys[0, 0, layer.regions.place(row, position)] = 1000 * self.names[row] + position
        self.lengths[row] = end

    def check(self) -> None:
        for layer in self.cache.ragged_layers:
            regions = layer.regions
            taken = sorted((b, b + r) for b, r in zip(regions.bases, regions.rooms, strict=True) if r)
            assert all(end <= start for (_, end), (start, _) in itertools.pairwise(taken))
            assert all(
                base % ALIGNED == 0 == room % ALIGNED for base, room in zip(regions.bases, regions.rooms, strict=True)
            )
            assert layer.keys.shape[2] >= max((end for _, end in taken), default=0)
            for row, (name, length) in enumerate(zip(self.names, self.lengths, strict=True)):
                first = regions.dropped[row]
                assert first == 0 or first <= length - WINDOW
                base = regions.bases[row]
                held = layer.keys[0, 0, base : base + length - first, 0].tolist()
                assert held == [1000 * name + position for position in range(first, length)]


def test_what_becomes_of_rows_their_columns_are_where_they_are_looked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ragged_cache, "_MARGIN", 5)
    monkeypatch.setattr(ragged_cache, "_MORE_ROOM", 7)
    dice, columns, names = random.Random(5), Columns(), iter(range(1, 1000))
    for _ in range(400):
        move = dice.random()
        rows = len(columns.names)
        if rows == 0 or (move < 0.05 and rows < 6):
            columns.cache.add_rows(1)
            columns.names.append(next(names))
            columns.lengths.append(0)
        elif move < 0.1:
            kept = dice.sample(range(rows), dice.randint(1, rows))
            columns.cache.keep_rows(kept)
            columns.names = [columns.names[row] for row in kept]
            columns.lengths = [columns.lengths[row] for row in kept]
        else:
            row = dice.randrange(rows)
            held = max(0, columns.lengths[row] - dice.choice([0, 0, 1, 3, 9, 40]))
            columns.write(row, held, held + dice.choice([1, 2, 4, 30]))
        columns.check()


def test_a_row_that_is_named_again_begins_with_nothing() -> None:
    model: Any = tiny("llama")
    runner, stats = RaggedRunner(model, "all", rows=2), LevelStats("all", 0)
    texts = [[5, 6, 7, 8], [9, 10]]
    with torch.no_grad():
        runner.run(Context(texts, Prompt.apart([4, 2], [0, 1])), [[], []], stats)
        runner.keep_rows([1, 0, 1])
        assert runner.memo == [[9, 10], [5, 6, 7, 8], []]
        rows = [[9, 10, 3], [5, 6, 7, 8, 4], [9, 10, 11]]
        logits = runner.run(Context(rows, Prompt.apart([2, 4, 2], [0, 1, 2])), [[], [], []], stats).logits
        for row, text in zip(logits, rows, strict=True):
            torch.testing.assert_close(row[0], model(torch.tensor([text])).logits[0, -1], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_equal_prompts_have_buffers_made_once() -> None:
    model, rows, length = tiny("llama"), 7, 40
    runner, stats = RaggedRunner(model, "all", rows=rows), LevelStats("all", 0)
    ids = [3 + place % 40 for place in range(length)]
    prompt = Prompt.apart([length] * rows, range(rows))
    logits = runner.run(Context([list(ids) for _ in range(rows)], prompt), [[]] * rows, stats).logits
    layers = model.config.num_hidden_layers
    assert runner.ragged.regions[None].changes == layers, "each layer's once"
    assert all(torch.equal(row, logits[0]) for row in logits)
    following = runner.run(Context([[*ids, 5 + row] for row in range(rows)], prompt), [[]] * rows, stats).logits
    alone = RaggedRunner(model, "one", rows=1)
    context = Context([[*ids, 5 + rows - 1]], Prompt.apart([length], [0]))
    wanted = alone.run(context, [[]], stats).logits
    torch.testing.assert_close(following[-1, -1], wanted[0, -1], rtol=1e-4, atol=1e-4)


def test_only_rows_that_are_asked_take_what_another_has_read() -> None:
    """A middle that drafts for one row of three copies that row's columns, and they are those of its lender."""
    model: Any = tiny("llama")
    lender, borrower = RaggedRunner(model, "target", rows=3), RaggedRunner(model, "middle", rows=3)
    borrower.lender, borrower.borrows_from = lender, 4
    texts = [list(range(5, 17)), list(range(9, 18)), list(range(3, 18))]
    context, stats = Context(texts, Prompt.apart([12, 9, 15], [0, 1, 2])), LevelStats("all", 0)
    with torch.no_grad():
        whole = lender.run(context, [[], [], []], stats)
        borrower.asked = [False, True, False]
        again = borrower.run(Context([[*ids, 3] for ids in texts], context.prompt), [[], [], []], stats)
    assert list(map(len, borrower.memo)) == [0, 10, 0]
    assert again.counts == [0, 1, 0], "nine columns were taken, and one was read"
    for mine, theirs in zip(borrower.ragged.ragged_layers, lender.ragged.ragged_layers, strict=True):
        for own, lent in ((mine.keys, theirs.keys), (mine.values, theirs.values)):
            here, there = mine.regions.place(1, 0), theirs.regions.place(1, 0)
            assert torch.equal(own[:, :, here : here + 9], lent[:, :, there : there + 9])
    assert whole.counts == [12, 9, 15]


def test_a_text_outgrows_windows_that_are_much_shorter() -> None:
    """One row of a text that its windows hold as well stays in buffers that compiled blocks write to."""
    windowed: Any = tiny("mistral", sliding_window=WINDOW)
    for columns, apart in ((2 * WINDOW + 64, False), (2 * WINDOW + 65, True)):
        assert isinstance(runner_for(windowed, "all", rows=1, columns=columns), RaggedRunner) == apart
    assert not isinstance(runner_for(windowed, "all", rows=0, columns=1000), RaggedRunner)
    assert not isinstance(runner_for(tiny("llama"), "all", rows=1, columns=1000), RaggedRunner)


def test_a_few_columns_that_are_taken_leave_those_before_where_they_are() -> None:
    """Of layers with a window: the lender has let go of columns that the middle still holds, and sees."""
    model: Any = tiny("mistral", sliding_window=16, max_position_embeddings=1024)
    ids = torch.randint(3, 48, (200,), generator=torch.Generator().manual_seed(0)).tolist()
    lender, borrower = (RaggedRunner(model, name, rows=1) for name in ("target", "middle"))
    borrower.lender, borrower.borrows_from, stats = lender, 4, LevelStats("all", 0)

    def read(runner: RaggedRunner, count: int) -> torch.Tensor:
        return runner.run(Context([ids[:count]], Prompt.apart([40], [0])), [[]], stats).logits[0, -1]

    with torch.no_grad():
        for count in range(100, 190, 6):
            for more in range(count - 5 if count > 100 else count, count + 1):
                read(lender, more)
            found, wanted = read(borrower, count + 1), read(RaggedRunner(model, "fresh", rows=1), count + 1)
            assert torch.allclose(found, wanted, atol=1e-4)
