# SPDX-License-Identifier: Apache-2.0
"""An engine that takes what pays, and follows the model: what it writes is what the model alone would."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel

import hf_polyspec
from hf_polyspec import Engine

PROMPTS = [[3, 4, 5], [9], [7, 8, 7, 8, 7]]
SHORT: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}


def plain(model: Any, ids: list[int]) -> list[int]:
    whole = torch.tensor([ids])
    return list(model.generate(whole, attention_mask=torch.ones_like(whole), **SHORT)[0].tolist())


def written(engine: Engine) -> list[list[int]]:
    handles = [engine.submit(ids, **SHORT) for ids in PROMPTS]
    return [list(handle.result(240)[0].tolist()) for handle in handles]


def test_an_engine_takes_what_pays(model: PreTrainedModel, timed: list[Any]) -> None:
    wanted = [plain(model, ids) for ids in PROMPTS]
    with Engine(model, "auto", slots=2) as engine:
        assert written(engine) == wanted
        handle = engine.submit(PROMPTS[0], return_dict_in_generate=True, **SHORT)
        stats = handle.result(240).polyspec
        assert engine._crew.held.target is not model, "a packed copy runs"
    assert [level.name.split()[-1] for level in stats.levels[1:]] == ["int8", "suffix"]
    assert stats.chosen.endswith("+ int8 (its pass takes 0.5 ms, it agrees in 90%) + suffix")
    assert len(timed) == 2
    with Engine(model, ["auto"], polyspec_block_size=3) as engine:
        assert written(engine) == wanted
        assert engine.options.polyspec_block_size == 3, "the caller's word comes first"
    assert len(timed) == 2, "what was measured is known"


def test_the_list_form_takes_auto(model: PreTrainedModel, timed: list[Any]) -> None:
    found = hf_polyspec.generate_batch(model, PROMPTS, assistant_models="auto", slots=2, **SHORT)
    for answer, ids in zip(found.values(), PROMPTS, strict=True):
        assert answer.error is None
        assert [*ids, *answer.generated_tokens] == plain(model, ids)
        assert answer.polyspec is not None
        assert answer.polyspec.chosen is not None


def test_what_it_runs_follows_the_model(model: PreTrainedModel, timed: list[Any]) -> None:
    """Weights that change while no request is there: the copies are those of the new ones."""
    with Engine(model, "auto", slots=2) as engine:
        before = written(engine)
        with torch.no_grad():
            model.lm_head.weight.data.mul_(-1)
        after = written(engine)
        assert after == [plain(model, ids) for ids in PROMPTS] != before
        assert written(engine) == after
        assert len(engine._crew.held.levels) == 2, "the int8 copy is there again, made of the new weights"
    assert len(timed) == 2


def test_fixed_sizes_and_the_online_control(model: PreTrainedModel, timed: list[Any]) -> None:
    wanted = [plain(model, ids) for ids in PROMPTS]
    for control in ("fixed", "online"):
        with Engine(model, "auto", slots=3, polyspec_control=control) as engine:
            assert written(engine) == wanted
