# SPDX-License-Identifier: Apache-2.0
"""Same seed, same text through every door, and for what wraps a model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import peft
import pytest
import torch
from every_door import DOORS
from same_seed import CHANCES, ENDS, sampled
from tiny_models import noisy, prompts, tiny
from transformers import GenerationMixin

import hf_polyspec
from hf_polyspec.generation.plan import Plan, mark_of


@pytest.fixture(autouse=True)
def _leave_no_door_open() -> Iterator[None]:
    before = GenerationMixin.generate
    yield
    hf_polyspec.disable()
    assert GenerationMixin.generate is before


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("door", DOORS, ids=lambda door: door.__name__)
def test_every_door(door: Callable[..., Any], batch: int) -> None:
    model = tiny("llama")
    plain, left = sampled(model, 1, **prompts(batch), **ENDS)
    for seed in ({}, {"polyspec_seed": 1}):
        torch.manual_seed(1 if not seed else 2)
        levels = [noisy(model, 0.03), noisy(model, 0.05)]
        ours = door(model, **{**CHANCES, **prompts(batch), **ENDS, **seed}, assistant_models=levels)
        assert torch.equal(ours.sequences, plain.sequences)
        assert ours.polyspec.seed_holds
        assert seed or torch.equal(torch.get_rng_state(), left)


def test_a_plan_that_drafts_nothing_keeps_a_seed() -> None:
    model = tiny("llama")
    drafter = noisy(model, 0.03)
    plan = Plan(
        "test", "", mark_of(model, "m"), (mark_of(drafter, "d"),), 1.0, 16, (), {}, 1.0, 1.0
    )  # fmt: skip
    plain, _ = sampled(model, 3, **prompts(1))
    hf_polyspec.enable()
    torch.manual_seed(4)
    before = torch.get_rng_state()
    request = {**CHANCES, **prompts(1), "assistant_models": [drafter], "polyspec_plan": plan}
    ours = model.generate(**request, polyspec_seed=3)
    assert torch.equal(ours.sequences, plain.sequences)
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(3)
    assert torch.equal(model.generate(**request).sequences, plain.sequences)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
def test_adapters() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        adapted = peft.get_peft_model(tiny("llama"), peft.LoraConfig(r=2, init_lora_weights=False, lora_alpha=8))
    adapted.eval()
    hf_polyspec.enable()
    for batch in (1, 3):
        plain, left = sampled(adapted, 5, **prompts(batch), **ENDS)
        ours, after = sampled(adapted, 5, assistant_models=["early-exit:1"], **prompts(batch), **ENDS)
        assert torch.equal(ours.sequences, plain.sequences)
        assert torch.equal(after, left)
        assert ours.polyspec.seed_holds
