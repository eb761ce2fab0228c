# SPDX-License-Identifier: Apache-2.0
"""Likeliest ids of rows that each have a region of the cache: those that all of a pass would have shown, or none."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from packed_models import MODELS, Tiny, packed

from hf_polyspec.cpu.compiled import compiles
from hf_polyspec.errors import LevelError
from hf_polyspec.exactness.context import Context, Prompt
from hf_polyspec.exactness.passes import Picks
from hf_polyspec.host.moments import one_moment
from hf_polyspec.host.picking import picks
from hf_polyspec.host.ragged import RaggedRunner
from hf_polyspec.host.row_readings import Padded
from hf_polyspec.telemetry.counters import LevelStats

if not compiles():
    pytest.skip("blocks are not fused here", allow_module_level=True)

from hf_polyspec.cpu.angles import TABLE
from hf_polyspec.cpu.compiled.ends import SLACK
from hf_polyspec.cpu.whole_pass import WholePass

KNOWN = 48
LENGTHS = (5, 9, 2, 7)


class Rows:
    """Texts read in two ways: by all of a pass, and by its likeliest ids where those can be had.

    Args:
        model: packed; firsts: per row, the position of the prompt's first id.
    """

    def __init__(self, model: Any, firsts: Sequence[int] = (), lengths: Sequence[int] = LENGTHS) -> None:
        self.dice, self.stats = random.Random(0), LevelStats("the target", 0)
        rows, width = len(lengths), max(lengths)
        self.fast, self.slow = (RaggedRunner(model, "the target", rows=rows) for _ in range(2))
        mask = torch.tensor([[int(column >= width - n) for column in range(width)] for n in lengths])
        places = (mask.cumsum(-1) - 1).clamp(min=0) + torch.tensor(firsts or [0] * rows)[:, None]
        ids = [[0] * (width - n) + [self.dice.randrange(KNOWN) for _ in range(n)] for n in lengths]
        self.context = Context(ids, Prompt(width, mask, places))
        self.picked: list[bool] = []

    def whole(self, runner: RaggedRunner, drafts: list[list[int]], asked: Sequence[bool]) -> list[torch.Tensor]:
        runner.asked = list(asked)
        given: Any = runner.run(self.context, drafts, self.stats).given
        return [row[:, :KNOWN] if on else row[:0] for row, on in zip(given.rows, asked, strict=True)]

    def go_on(self, sizes: Sequence[int] = (), right: bool = False, asked: Sequence[bool] = ()) -> Picks | None:
        """One check, which must come to the same both ways; texts go on by one token, or as far as drafts are right."""
        rows = self.context.batch
        asked, sizes = asked or [True] * rows, sizes or [0] * rows
        drafts = [[self.dice.randrange(KNOWN) for _ in range(size)] for size in sizes]
        for place in range(max(sizes) if right else 0):
            said = [row.argmax(-1).tolist() for row in self.whole(self.slow, drafts, asked)]
            for draft, of_row in zip(drafts, said, strict=True):
                draft[place : place + 1] = of_row[place : place + 1] if place < len(draft) else []
        wanted = self.whole(self.slow, drafts, asked)
        said = [row.argmax(-1).tolist() for row in wanted]
        found = picks(self.fast, self.context, drafts, self.stats, KNOWN, asked)
        if found is None:
            again = self.whole(self.fast, drafts, asked)
            assert [row.argmax(-1).tolist() for row in again] == said
        else:
            assert found.tokens == said
            self._alike(found, wanted, drafts, asked)
        self.picked.append(found is not None)
        kept = [len(draft) if right else 0 for draft in drafts]
        self.context = self.context.extended([row[: more + 1] for row, more in zip(said, kept, strict=True)])
        return found

    def _alike(self, found: Picks, wanted: list[torch.Tensor], drafts: list[list[int]], asked: Sequence[bool]) -> None:
        for leads, logits in zip(found.leads, wanted, strict=True):
            if len(logits):
                best, second = logits.topk(2).values.float().unbind(-1)
                near = SLACK[self.fast.model.dtype] * float(best.abs().max())
                torch.testing.assert_close(torch.tensor(leads), best - second, rtol=0, atol=near)
        longer = self.context.extended(drafts).ids
        assert [ids for ids, on in zip(found.read, asked, strict=True) if on] == [
            ids for ids, on in zip(longer, asked, strict=True) if on
        ]
        assert found.counts is not None
        assert found.fed == max(found.counts)
        assert [count > 0 for count in found.counts] == list(asked)
        assert self.fast.memo == self.slow.memo

    def settle(self) -> None:
        """Each kind of pass is tried, and the likeliest ids can be had."""
        for _ in range(4):
            self.go_on()
        assert self.picked[-1]


@torch.no_grad()
@pytest.mark.parametrize("within", [nullcontext, one_moment])
@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_drafts_of_any_lengths(tiny: Tiny, make: Callable[[Tiny], Any], within: Callable[[], Any]) -> None:
    texts = Rows(make(tiny))
    with within():
        texts.settle()
        for right in (False, True, False):
            for sizes in ((0, 0, 0, 0), (3, 0, 1, 0), (0, 5, 0, 2), (1, 1, 1, 1), (0, 0, 0, 0)):
                texts.go_on(sizes, right=right)
    assert texts.picked.count(False) <= 2


@torch.no_grad()
def test_rows_that_wait_leave_and_join(tiny: Tiny) -> None:
    texts = Rows(packed(tiny))
    texts.settle()
    for asked in ((True, False, True, True), (False, False, False, True), (True, True, True, True)):
        texts.go_on((2, 0, 1, 0), asked=asked)
    for runner in (texts.fast, texts.slow):
        runner.keep_rows([3, 1])
    texts.context = texts.context.select([3, 1])
    texts.go_on()
    texts.go_on((0, 2))
    apart = Context([list(ids) for ids in texts.fast.own(texts.context)], Prompt.apart((1, 1), (0, 1)))
    texts.context = apart.joined(Context([[3, 1, 4, 1, 5]], Prompt.apart((5,), (2,))))
    for runner in (texts.fast, texts.slow):
        runner.add_rows(1)
    texts.go_on()
    texts.go_on((0, 1, 2))
    assert all(texts.picked[-7:])


@torch.no_grad()
def test_regions_that_grow(tiny: Tiny) -> None:
    texts = Rows(packed(tiny, max_position_embeddings=1024))
    with one_moment():
        texts.settle()
        before = texts.fast.ragged.regions[None].changes
        for _ in range(20):
            texts.go_on((9, 0, 9, 0), right=True)
    assert texts.picked.count(False) <= 3
    assert texts.fast.ragged.regions[None].changes > before


@torch.no_grad()
@pytest.mark.parametrize(
    "firsts", [(0, 3, 900, 11), (TABLE - 4, 5, TABLE + 1, 7 * TABLE), (3 * TABLE, 3 * TABLE + 9, 3 * TABLE, 3 * TABLE)]
)
def test_positions_that_a_caller_gives(tiny: Tiny, firsts: tuple[int, ...]) -> None:
    texts = Rows(packed(tiny, max_position_embeddings=16 * TABLE), firsts)
    texts.settle()
    for sizes in ((0, 0, 0, 0), (4, 0, 3, 2), (1, 1, 0, 9)):
        texts.go_on(sizes, right=True)
    assert all(texts.picked[-3:])


@torch.no_grad()
def test_where_more_is_asked_or_something_is_in_the_way(tiny: Tiny) -> None:
    texts = Rows(packed(tiny))
    texts.settle()
    runner = texts.fast
    memo = [list(ids) for ids in runner.memo]

    def refused(drafts: list[list[int]] | None = None, context: Context | None = None) -> bool:
        found = picks(runner, context or texts.context, drafts or [[]] * 4, texts.stats, KNOWN, [True] * 4)
        return found is None and runner.memo == memo

    with torch.enable_grad():
        assert refused()
    with runner.recording({"output_hidden_states": True}):
        assert refused()
    assert refused([[5, -1], [], [], []])
    assert refused([[], [KNOWN], [], []])
    assert refused([[7] * 20] * 4), "more columns than such passes are for"
    prompt = texts.context.prompt
    assert refused(context=Context(texts.context.ids, Prompt(prompt.width, prompt.mask, prompt.positions, hidden=1)))
    texts.go_on()
    assert texts.picked[-1]


@torch.no_grad()
def test_rows_that_read_the_same_are_read_once(tiny: Tiny) -> None:
    texts = Rows(packed(tiny), lengths=(4, 4))
    texts.settle()
    same = texts.context.ids[0]
    for runner in (texts.fast, texts.slow):
        runner.memo = [[], []]
    texts.context = Context([[*same, *range(20)]] * 2, texts.context.prompt)
    texts.go_on()
    assert not texts.picked[-1]


@torch.no_grad()
def test_layers_with_windows_have_passes_of_their_own(tiny: Tiny) -> None:
    texts = Rows(packed(tiny, "mistral", sliding_window=6))
    for _ in range(5):
        texts.go_on()
    assert not any(texts.picked)


@torch.no_grad()
def test_logits_that_are_no_numbers(tiny: Tiny) -> None:
    texts = Rows(packed(tiny))
    texts.settle()
    texts.fast.model.lm_head.weight[5] = float("nan")
    assert picks(texts.fast, texts.context, [[3], [], [], []], texts.stats, KNOWN, [True] * 4) is None
    again = texts.whole(texts.fast, [[3], [], [], []], [True] * 4)
    assert all(bool(row[:, 5].isnan().all()) for row in again)


@torch.no_grad()
def test_a_pass_that_fails_leaves_nothing_behind(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = Rows(packed(tiny))
    texts.settle()

    def fail(*_: Any) -> None:
        raise MemoryError("no room")

    with monkeypatch.context() as broken:
        broken.setattr(WholePass, "_jobs", fail)
        texts.fast.asked = [True, True, False, False]
        with pytest.raises((MemoryError, LevelError)):
            picks(texts.fast, texts.context, [[]] * 4, texts.stats, KNOWN, texts.fast.asked)
    assert texts.fast.memo == [[], [], [], []]
    assert texts.fast.asked is None, "the next pass is for all rows"
    assert all(layer.keys is None for layer in texts.fast.ragged.ragged_layers)
    texts.go_on((2, 0, 0, 1))
    texts.go_on()
    assert texts.picked[-1]


def test_what_padded_rows_have_read_is_a_list_in_all_but_name() -> None:
    own = [[1, 2], [3]]
    read = Padded([[0, 1, 2, 9], [0, 0, 3]], [1, 2], own)
    own[0] = []
    assert read == [[0, 1, 2], [0, 0, 3]]
    assert read[:1] == [[0, 1, 2]]
    assert read[-1] == [0, 0, 3]
    assert read != [[0, 1, 2]]
