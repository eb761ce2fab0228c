# SPDX-License-Identifier: Apache-2.0
"""transformers' own generate_batch() takes assistants once that is enabled, and is given back as it was."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from tiny_models import tiny
from transformers import GenerationConfig, GenerationMixin

import hf_polyspec

PROMPTS = [[3, 4, 5], [9], [7, 8, 7, 8, 7]]
SHORT: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False}


@pytest.fixture
def model() -> Iterator[Any]:
    hf_polyspec.enable()
    yield tiny("llama")
    hf_polyspec.disable()


def plain(model: Any, ids: list[int]) -> list[int]:
    whole = torch.tensor([ids])
    return list(model.generate(whole, attention_mask=torch.ones_like(whole), **SHORT)[0, len(ids) :].tolist())


@pytest.mark.parametrize("config", [False, True])
def test_the_answers_are_generates(model: Any, config: bool) -> None:
    given: dict[str, Any] = {"generation_config": GenerationConfig(**SHORT)} if config else SHORT
    found = model.generate_batch(PROMPTS, **given, assistant_models=["suffix"], slots=2, progress_bar=False)
    assert list(found) == ["req_0", "req_1", "req_2"]
    for answer, ids in zip(found.values(), PROMPTS, strict=True):
        assert answer.error is None
        assert answer.prompt_ids == ids
        assert answer.generated_tokens == plain(model, ids)


def test_without_assistants_it_is_transformers_own(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    hf_polyspec.disable()
    asked: list[Any] = []
    monkeypatch.setattr(
        GenerationMixin, "generate_batch", lambda self, inputs, **given: asked.append((inputs, given)), raising=False
    )
    hf_polyspec.enable()
    model.generate_batch(PROMPTS, warmup=False)
    assert asked == [(PROMPTS, {"warmup": False})]
    hf_polyspec.disable()


def test_what_is_of_their_loop_is_refused(model: Any) -> None:
    with pytest.raises(ValueError, match="persistent_manager is of transformers' own continuous batching"):
        model.generate_batch(PROMPTS, assistant_models=["suffix"], persistent_manager=True)


def test_it_is_given_back() -> None:
    before = GenerationMixin.generate_batch
    own = "generate_batch" in vars(GenerationMixin)
    hf_polyspec.enable()
    hf_polyspec.enable()
    assert GenerationMixin.generate_batch is not before
    hf_polyspec.disable()
    assert GenerationMixin.generate_batch is before
    assert ("generate_batch" in vars(GenerationMixin)) == own
