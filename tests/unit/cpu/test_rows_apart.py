# SPDX-License-Identifier: Apache-2.0
"""Compiled blocks over rows that each have a region of keys and values: to the last bit what each row gets alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_polyspec.cpu.compiled import compiles

if not compiles():
    pytest.skip("compiled functions do not run here", allow_module_level=True)

from stacked_blocks import DEPTH, packed_model

from hf_polyspec.cpu.compiled.attention import POSITIONS, jobs_apart
from hf_polyspec.cpu.compiled.whole_block import Apart
from hf_polyspec.cpu.compiled.whole_stack import StackTask
from hf_polyspec.exactness.context import Context, Prompt
from hf_polyspec.exactness.proposal import TreeProposal
from hf_polyspec.exactness.tree_geometry import ROOT
from hf_polyspec.host.ragged import RaggedRunner
from hf_polyspec.host.runner import ModelRunner
from hf_polyspec.telemetry.counters import LevelStats

Tiny = Callable[..., PreTrainedModel]
LENGTHS = (33, 5, 20, 9)
_SOURCE = torch.Generator().manual_seed(9)
TEXTS = [torch.randint(3, 48, (length + 200,), generator=_SOURCE).tolist() for length in LENGTHS]
# Per pass and row: tokens behind the prompt that are the row's by now, and those of its draft; None for a row that is
# not asked. Drafts are taken back, rows rest, and outgrow their regions.
PASSES: list[list[tuple[int, int] | None]] = [
    [(0, 0), (0, 0), (0, 0), (0, 0)],
    [(1, 2), (1, 0), (1, 3), (1, 1)],
    [(2, 0), None, (2, 2), (3, 0)],
    [(3, 1), (2, 5), None, None],
    [(4, 0), (3, 0), (3, 0), (4, 0)],
    [(60, 3), (40, 0), (9, 1), (5, 0)],
    [(61, 0), (41, 2), (10, 0), (6, 4)],
]


@pytest.fixture
def stacks(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Blocks of every task over rows of their own."""
    seen: list[int] = []
    run = StackTask.run

    def counted(self: StackTask, *given: Any) -> None:
        if isinstance(given[-1], Apart):
            seen.append(len(self.outputs))
        run(self, *given)

    monkeypatch.setattr(StackTask, "run", counted)
    return seen


def draft_of(row: int, step: int, count: int) -> list[int]:
    return [3 + (7 * row + 5 * step + n) % 45 for n in range(count)]


@torch.no_grad()
def alone(model: nn.Module, row: int) -> list[Tensor | None]:
    runner, stats = ModelRunner(model, "one"), LevelStats("one", 0)
    prompt = Prompt.apart([LENGTHS[row]], [row])
    found: list[Tensor | None] = []
    for step, rows in enumerate(PASSES):
        asked = rows[row]
        if asked is None:
            found.append(None)
            continue
        context = Context([TEXTS[row][: LENGTHS[row] + asked[0]]], prompt)
        found.append(runner.run(context, [draft_of(row, step, asked[1])], stats).logits[0])
    return found


@torch.no_grad()
def side_by_side(model: nn.Module) -> list[list[Tensor | None]]:
    runner, stats = RaggedRunner(model, "all", rows=len(LENGTHS)), LevelStats("all", 0)
    prompt = Prompt.apart(LENGTHS, range(len(LENGTHS)))
    held = list(LENGTHS)
    found: list[list[Tensor | None]] = [[] for _ in LENGTHS]
    for step, rows in enumerate(PASSES):
        held = [n if one is None else n + one[0] for n, one in zip(LENGTHS, [r or (0, 0) for r in rows], strict=True)]
        context = Context([text[:count] for text, count in zip(TEXTS, held, strict=True)], prompt)
        drafts = [[] if one is None else draft_of(row, step, one[1]) for row, one in enumerate(rows)]
        runner.asked = [one is not None for one in rows]
        logits = runner.run(context, drafts, stats).logits
        for row, one in enumerate(rows):
            found[row].append(None if one is None else logits[row, : 1 + one[1]])
    return found


@pytest.mark.parametrize(
    "form", ["float32", "bfloat16", "bfloat16, wide heads", "int8 float32", "int8 bfloat16, wide heads"]
)
def test_logits_are_those_of_each_row_alone(tiny: Tiny, form: str, stacks: list[int]) -> None:
    model = packed_model(tiny, form)
    together = side_by_side(model)
    assert stacks.count(DEPTH) >= 3
    for row, found in enumerate(together):
        for one, other in zip(found, alone(model, row), strict=True):
            assert (one is None) == (other is None)
            if one is not None and other is not None:
                assert torch.equal(one, other)


def test_trees_go_with_rows_that_only_go_on(tiny: Tiny) -> None:
    model = packed_model(tiny)
    prompt = Prompt.apart(LENGTHS[:2], [0, 1])
    context = Context([text[:length] for text, length in zip(TEXTS[:2], LENGTHS[:2], strict=True)], prompt)
    tree = TreeProposal([[5, 6, 7], []], [[ROOT, 0, ROOT], []], [[1, 1, 1], []])
    runner, stats = RaggedRunner(model, "all", rows=2), LevelStats("all", 0)
    with torch.no_grad():
        passed = runner.run_tree(context, tree, stats)
        runner.keep_paths(passed, context, tree, [[2], []])
        after = runner.run(context.extended([[7, 9], [9]]), [[], []], stats).logits
        for row, more in ((0, [7, 9]), (1, [9])):
            one = ModelRunner(model, "one")
            wanted = one.run(
                Context([context.ids[row] + more], Prompt.apart([LENGTHS[row]], [row])), [[]], LevelStats("one", 0)
            )
            torch.testing.assert_close(after[row, 0], wanted.logits[0, 0], rtol=1e-4, atol=1e-4)


def test_parts_of_attention_cover_every_position_once() -> None:
    spans = [(0, 40, 0, 40), (40, 1, 64, 9), (41, 3, 160, 23)]
    for group in (1, 3, 40):
        jobs = jobs_apart(spans, group).tolist()
        assert all(count * group <= max(POSITIONS, group) for _, count, _, _ in jobs)
        places = sorted(
            (first + n, base, columns - count + n + 1) for first, count, base, columns in jobs for n in range(count)
        )
        wanted = [
            (first + n, base, columns - count + n + 1) for first, count, base, columns in spans for n in range(count)
        ]
        assert places == wanted
        assert [job[3] for job in jobs] == sorted((job[3] for job in jobs), reverse=True)
