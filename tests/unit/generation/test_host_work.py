# SPDX-License-Identifier: Apache-2.0
"""What Python does in a round does not grow with the text before it, counted in instructions and not on a clock.

What is done to a whole list or tensor at once counts for one; loops over ids, and calls for each, are what is seen.
"""

from __future__ import annotations

import statistics
import sys
from typing import Any

import pytest
import torch
from tiny_models import tiny

import hf_polyspec
from hf_polyspec import SuffixDrafter
from hf_polyspec.exactness.context import Context
from hf_polyspec.generation.loop import DecodingLoop

SHORT, LONG, ROUNDS = 500, 6000, 12
VOCABULARY = 7000
AN_ID = 0.25
"""Instructions a round for every further id: a loop over ids takes 3 or more for each."""


class Instructions:
    """Counts those that Python runs in this thread, and marks where rounds begin."""

    def __init__(self) -> None:
        self.count = 0
        self.marks: list[int] = []

    def __call__(self, frame: Any, event: str, _: Any) -> Instructions:
        if event == "call":
            frame.f_trace_opcodes, frame.f_trace_lines = True, False
        self.count += event == "opcode"
        return self


@pytest.fixture(scope="module")
def target() -> Any:
    return tiny(vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=1, max_position_embeddings=8192)


def prompt(length: int) -> torch.Tensor:
    """Ids that do not come again, but for a passage at the end that a drafter finds, whatever stands before it."""
    ids = torch.randperm(VOCABULARY - 3, generator=torch.Generator().manual_seed(1)) + 3
    passage = ids[:24]
    return torch.cat([ids[24 : length - 24], passage, passage])[None, -length:]


def of_a_round(target: Any, levels: list[Any], length: int, monkeypatch: pytest.MonkeyPatch) -> float:
    """Instructions of a usual round behind a prompt of so many ids."""
    counted = Instructions()
    with monkeypatch.context() as patched:
        genuine = DecodingLoop.round

        def marked(self: DecodingLoop) -> Any:
            counted.marks.append(counted.count)
            return genuine(self)

        patched.setattr(DecodingLoop, "round", marked)
        before = sys.gettrace()
        ids = prompt(length)
        sys.settrace(counted)
        try:
            hf_polyspec.generate(
                target,
                ids,
                attention_mask=torch.ones_like(ids),
                assistant_models=levels,
                polyspec_control="fixed",
                max_new_tokens=ROUNDS,
                do_sample=False,
                repetition_penalty=1.3,
            )
        finally:
            sys.settrace(before)
    rounds = [after - one for one, after in zip(counted.marks, counted.marks[1:], strict=False)]
    assert len(rounds) > 4
    return statistics.median(rounds[1:])  # the first reads the prompt


def an_id(target: Any, levels: list[Any], monkeypatch: pytest.MonkeyPatch) -> float:
    """Instructions of a round for every id before it."""
    short, long = (of_a_round(target, levels, length, monkeypatch) for length in (SHORT, LONG))
    return (long - short) / (LONG - SHORT)


LEVELS: dict[str, Any] = {"nothing": list, "suffixes": lambda: [SuffixDrafter()]}


@pytest.mark.parametrize("below", LEVELS)
def test_a_round_takes_as_long_behind_a_long_text(target: Any, below: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert an_id(target, LEVELS[below](), monkeypatch) < AN_ID


@pytest.mark.parametrize("below", LEVELS)
def test_a_round_that_copies_all_ids_is_caught(target: Any, below: str, monkeypatch: pytest.MonkeyPatch) -> None:
    genuine = Context.extended

    def copied(self: Context, more: Any) -> Context:
        found = genuine(self, more)
        return Context([[token for token in row] for row in found.ids], found.prompt)  # noqa: C416

    monkeypatch.setattr(Context, "extended", copied)
    assert an_id(target, LEVELS[below](), monkeypatch) > 1
