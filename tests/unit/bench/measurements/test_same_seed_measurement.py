# SPDX-License-Identifier: Apache-2.0
"""`polyspec measure same-seed` counts equal texts, sees those that are not, and tells ties from mistakes."""

from __future__ import annotations

import pytest
import torch
from tiny_models import noisy, prompts, tiny

from hf_polyspec.bench.measurements import same_seed
from hf_polyspec.bench.measurements.same_seed import TIE, compare, distance
from hf_polyspec.exactness.noise import SharedNoise
from hf_polyspec.generation import chances
from hf_polyspec.host.configs import generation_config
from hf_polyspec.planning.texts import law_of

SIZES = {"seeds": range(3), "temperatures": (0.7, 1.0), "new_tokens": 12}


def test_equal_texts_are_counted() -> None:
    target = tiny("llama")
    found = compare(target, [noisy(target, 0.03)], [prompts(1), prompts(1, seed=4)], **SIZES)
    assert (found.texts, found.equal, found.states) == (12, 12, 12)
    assert found.tokens == 144
    assert found.passes < 100
    assert str(found).startswith("12 of 12 texts equal, 0 differ by a tie, 0 otherwise; generator equal after 12 of 12")


def test_a_wrong_text_is_no_tie(monkeypatch: pytest.MonkeyPatch) -> None:
    class Shifted(SharedNoise):
        def at(self, rows: object, steps: object) -> torch.Tensor:
            return super().at(rows, [[step + 1 for step in wanted] for wanted in steps])

    monkeypatch.setattr(chances, "SharedNoise", Shifted)
    target = tiny("llama")
    found = compare(target, [noisy(target, 0.03)], [prompts(1)], **SIZES)
    assert len(found.differences) == 6
    assert not any(one.is_tie for one in found.differences)


def test_two_ids_that_arrive_together_are_a_tie() -> None:
    """Equal laws and noise that is nearly equal: the distance is that of the noise."""
    target = tiny("llama").double()
    ids = prompts(1)["input_ids"]
    law = law_of(target, ids[0].tolist(), generation_config(target, 4, 1.0))
    torch.manual_seed(2)
    torch.empty(1, 48).exponential_(1)
    noise = torch.empty(1, 48).exponential_(1)[0].double()
    with torch.no_grad():
        scores = law.maker().scores_at(ids, target(torch.cat([ids, torch.tensor([[7]])], 1)).logits[:, -1])
    arrival = scores.softmax(-1)[0] / noise
    first, second = arrival.topk(2).indices.tolist()
    expected = float(1 - arrival[second] / arrival[first])
    found = distance(target, law, ids, [7], (second, first), 2)
    assert found == pytest.approx(expected, abs=1e-9)
    assert found > TIE
    assert same_seed.Difference(0, 0, 1.0, 0, 1, 2, 1.9e-4).is_tie
