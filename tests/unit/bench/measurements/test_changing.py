# SPDX-License-Identifier: Apache-2.0
"""The text that changes while it is written: what each part is, and that it is timed by itself."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_models import tiny

from hf_polyspec import generate
from hf_polyspec.bench.measurements import changing
from hf_polyspec.bench.measurements.changing import PARTS, Script, seconds_of_parts

IDS = [5, 9, 2, 11, 7]


@pytest.mark.parametrize("assistants", [None, [], ["suffix"]], ids=["plain", "alone", "suffix"])
def test_parts_are_timed_one_by_one(assistants: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a clock that moves on by one with every token, each part takes as long as it has tokens."""

    def put(self: changing.Stopwatch, value: torch.Tensor) -> None:
        self.times.append(float(len(self.times)))

    monkeypatch.setattr(changing.Stopwatch, "put", put)
    model, texts = tiny("llama"), []

    def call(arguments: dict[str, Any]) -> None:
        texts.append(generate(model, assistant_models=assistants, **arguments)[0].tolist())

    found = [seconds_of_parts(call, torch.tensor([IDS]), 8, seed) for seed in (3, 3, 4)]
    assert found == [[7.0, 8.0, 8.0]] * 3
    first, again, other = (text[len(IDS) :] for text in texts)
    assert first == again
    assert len(first) == len(PARTS) * 8
    assert first[16:] == (IDS * 2)[:8]
    assert first[:16] != other[:16]


def test_every_part_has_its_own_law() -> None:
    script, scores = Script(IDS, 4), torch.tensor([[0.0, 3.0, 1.0]])
    places = [torch.zeros(1, len(IDS) + place, dtype=torch.long) for place in (0, 3, 4, 7)]
    sure, still, unsure, late = (script(ids, scores) for ids in places)
    assert torch.equal(sure, still)
    assert torch.equal(unsure, late)
    assert torch.equal(sure, 20 * scores)
    assert torch.allclose(unsure, scores / 1.5)
    wide = torch.zeros(1, 12)
    assert [int(script(torch.zeros(1, len(IDS) + 8 + i, dtype=torch.long), wide).argmax()) for i in range(6)] == [
        *IDS,
        IDS[0],
    ]
