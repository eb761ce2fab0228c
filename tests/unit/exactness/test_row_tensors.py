# SPDX-License-Identifier: Apache-2.0
"""Rows of different lengths are judged as in a rectangle, and no position is looked at that no row has."""

from __future__ import annotations

import random

import pytest
import torch

from hf_polyspec.exactness.context import Context, Prompt
from hf_polyspec.exactness.distributions import LawMaker
from hf_polyspec.exactness.judgement import judge
from hf_polyspec.exactness.noise import SharedNoise
from hf_polyspec.exactness.proposal import Proposal
from hf_polyspec.exactness.row_tensors import RowTensors, fit_vocabulary

CPU, VOCABULARY = torch.device("cpu"), 7
LENGTHS = (0, 24, 3, 0, 1, 6, 0, 2)
"""Drafted tokens of the rows."""


def said(lengths: tuple[int, ...], seed: int = 0) -> RowTensors:
    places, first = [], 0
    for length in lengths:
        places.append((first, length + 1))
        first += length + 1
    values = torch.randn(first, VOCABULARY, generator=torch.Generator().manual_seed(seed)).to(torch.bfloat16)
    return RowTensors.of(values, places, CPU)


def proposal(logits: RowTensors, lengths: tuple[int, ...]) -> Proposal:
    """Drafts of which about two thirds of the tokens are what the model says."""
    dice = random.Random(1)
    tokens = [
        [int(token) if dice.random() < 0.7 else 0 for token in row[:length].argmax(-1)]
        for row, length in zip(logits.rows, lengths, strict=True)
    ]
    return Proposal(tokens, None, [[1] * length for length in lengths])


def law(sampled: bool) -> LawMaker:
    if not sampled:
        return LawMaker([], False, CPU)
    noise = SharedNoise([torch.Generator().manual_seed(3)], len(LENGTHS), VOCABULARY)
    return LawMaker([], True, CPU, noise=noise)


@pytest.mark.parametrize("sampled", [False, True], ids=["greedy", "coupled"])
def test_a_row_is_judged_as_in_a_rectangle(sampled: bool) -> None:
    logits = said(LENGTHS)
    offered = proposal(logits, LENGTHS)
    context = Context([[1, 2]] * len(LENGTHS), Prompt.apart([2] * len(LENGTHS), range(len(LENGTHS))))
    active = [b != 2 for b in range(len(LENGTHS))]
    by_rows, whole = (
        judge(law(sampled), context, offered, given, active, "auto", 0) for given in (logits, logits.rectangle())
    )
    assert (by_rows.tokens, by_rows.accepted) == (whole.tokens, whole.accepted)
    assert sampled or any(0 < kept < length for kept, length in zip(whole.accepted, LENGTHS, strict=True))
    assert by_rows.tokens[2] == []
    for b, tokens in enumerate(by_rows.tokens):
        for place in range(len(tokens)):
            assert torch.equal(by_rows.scores[b, place], whole.scores[b, place])


def test_what_nobody_drafted_is_not_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    genuine = LawMaker.choose

    def choose(self: LawMaker, scores: torch.Tensor, *given: object) -> torch.Tensor:
        seen.append(scores.shape[0] * scores.shape[1])
        return genuine(self, scores, *given)  # type: ignore[arg-type]

    monkeypatch.setattr(LawMaker, "choose", choose)
    logits = said(LENGTHS)
    context = Context([[1]] * len(LENGTHS), Prompt.apart([1] * len(LENGTHS), range(len(LENGTHS))))
    judge(law(False), context, proposal(logits, LENGTHS), logits, [True] * len(LENGTHS), "auto", 0)
    assert seen == [sum(length + 1 for length in LENGTHS)]  # 200 in a rectangle, 44 are wanted


def test_a_rectangle_holds_every_rows_own() -> None:
    logits = said(LENGTHS)
    whole = logits.rectangle()
    assert whole.shape == (len(LENGTHS), 25, VOCABULARY)
    assert whole.dtype == torch.float32
    for b, length in enumerate(LENGTHS):
        assert torch.equal(whole[b, : length + 1], logits.rows[b].float())
    some = logits.select([4, 1])
    assert torch.equal(some.rectangle()[0, :2], whole[4, :2])
    assert torch.equal(some[1, 20], whole[1, 20])


def test_rows_of_one_length_are_not_copied() -> None:
    values = torch.randn(6, VOCABULARY)
    logits = RowTensors.of(values, [(0, 2), (2, 2), (4, 2)], CPU)
    assert logits.rectangle().data_ptr() == values.data_ptr()
    assert RowTensors.of(values, [(0, 2), (4, 2), (2, 2)], CPU).rectangle()[1].equal(values[4:])


@pytest.mark.parametrize("size", [5, 7, 9])
def test_vocabularies_are_fitted(size: int) -> None:
    logits = said((1, 2))
    assert torch.equal(fit_vocabulary(logits, size).rectangle(), fit_vocabulary(logits.rectangle(), size))
