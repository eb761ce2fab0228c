# SPDX-License-Identifier: Apache-2.0
"""`assistant_models=[]`: the target alone in this package's loop, which is plain generate() in every respect."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from every_door import DOORS
from same_seed import CHANCES, ENDS, check
from tiny_models import noisy, prompts, tiny
from transformers import LogitsProcessor, LogitsProcessorList, PreTrainedModel
from transformers.generation.streamers import BaseStreamer

import hf_polyspec
from hf_polyspec.host.release import GENERATION_CACHE, cache_of

GREEDY: dict[str, Any] = {"max_new_tokens": 14, "do_sample": False, "return_dict_in_generate": True}


class Recording(BaseStreamer):
    """Keeps what it is given."""

    def __init__(self) -> None:
        self.heard: list[Any] = []

    def put(self, value: torch.Tensor) -> None:
        self.heard.append(value.tolist())

    def end(self) -> None:
        self.heard.append("end")


@pytest.fixture
def model() -> PreTrainedModel:
    return tiny("llama")


class Steps(LogitsProcessor):
    """Keeps a count of its calls, and bars the id that it depends on."""

    def __init__(self) -> None:
        self.calls: list[list[list[int]]] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.calls.append(input_ids.tolist())
        barred = torch.arange(scores.shape[1]) % 5 == len(self.calls) % 5
        return scores.masked_fill(barred[None], float("-inf"))


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("door", DOORS, ids=lambda door: door.__name__)
def test_every_door(model: PreTrainedModel, door: Callable[..., Any], batch: int) -> None:
    plain = model.generate(**prompts(batch), **GREEDY)
    try:
        ours = door(model, **prompts(batch), **GREEDY, assistant_models=[])
    finally:
        hf_polyspec.disable()
    assert ours.sequences.tolist() == plain.sequences.tolist()
    (level,) = ours.polyspec.levels
    assert (level.forward_passes, level.drafted) == (14, 0), "a token a pass, and nobody drafts"
    assert set().union(*ours.polyspec.token_levels) == {0}


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("ends", [{}, ENDS], ids=["full", "ends"])
def test_everything_that_comes_out(enabled: None, batch: int, ends: dict[str, Any]) -> None:
    model = tiny("llama", attention="eager")
    said = {"output_scores": True, "output_logits": True, "output_hidden_states": True, "output_attentions": True}
    texts = []
    for own in ({}, {"assistant_models": []}):
        steps, streamer = Steps(), Recording()
        options = {**prompts(batch), **GREEDY, **said, **ends, "repetition_penalty": 1.2}
        output = model.generate(**options, **own, streamer=streamer, logits_processor=LogitsProcessorList([steps]))
        texts.append((output, steps.calls, streamer.heard))
    (plain, *heard), (ours, *heard_of_ours) = texts
    assert heard_of_ours == heard
    assert type(ours) is type(plain)
    assert ours.sequences.tolist() == plain.sequences.tolist()
    # Of a row that has ended nobody reads them.
    ended = torch.isin(plain.sequences[:, prompts(batch)["input_ids"].shape[1] :], torch.tensor(ENDS["eos_token_id"]))
    for name in ("scores", "logits"):
        for step, values in enumerate(zip(getattr(ours, name), getattr(plain, name), strict=True)):
            on = ~ended[:, :step].any(1) if ends else torch.ones(batch, dtype=torch.bool)
            torch.testing.assert_close(values[0][on], values[1][on], rtol=1e-4, atol=1e-4)
    for name in ("hidden_states", "attentions"):
        shapes = [[[tuple(part.shape) for part in step] for step in getattr(output, name)] for output in (ours, plain)]
        assert shapes[0] == shapes[1]
    assert cache_of(ours).get_seq_length() == cache_of(plain).get_seq_length()


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("ends", [{}, ENDS], ids=["full", "ends"])
def test_the_same_seed_is_the_same_text(
    enabled: None, model: PreTrainedModel, batch: int, ends: dict[str, Any]
) -> None:
    for seed in range(3):
        check(model, [], seed, **prompts(batch), **ends, temperature=1.3, top_k=20)
        check(model, [], seed, {"polyspec_control": "online"}, **prompts(batch), **ends)
    with_own = [
        model.generate(**prompts(batch), **CHANCES, assistant_models=[], polyspec_seed=5).sequences for _ in range(2)
    ]
    torch.manual_seed(5)
    assert with_own[0].tolist() == with_own[1].tolist()
    assert with_own[0].tolist() == model.generate(**prompts(batch), **CHANCES).sequences.tolist()


def test_a_cache_is_continued_and_handed_back(enabled: None, model: PreTrainedModel) -> None:
    ids = prompts(1)["input_ids"]
    first = model.generate(ids, **GREEDY, assistant_models=[])
    after = [
        model.generate(
            first.sequences, **GREEDY, **{GENERATION_CACHE: copy.deepcopy(cache_of(first))}, **own
        ).sequences.tolist()
        for own in ({}, {"assistant_models": []})
    ]
    assert after[0] == after[1]


def test_none_and_an_empty_list_differ_and_a_config_may_say_either(enabled: None, model: PreTrainedModel) -> None:
    """None is transformers' own loop, where nothing of this package is seen."""
    model.generation_config.assistant_models = []
    assert len(model.generate(**prompts(1), **GREEDY).polyspec.levels) == 1
    assert not hasattr(model.generate(**prompts(1), **GREEDY, assistant_models=None), "polyspec")
    other = [noisy(model, 0.03)]
    assert len(model.generate(**prompts(1), **GREEDY, assistant_models=other).polyspec.levels) == 2


def test_a_packed_target(enabled: None, model: PreTrainedModel) -> None:
    plain = model.generate(**prompts(3), **GREEDY).sequences
    hf_polyspec.pack(model)
    ours = model.generate(**prompts(3), **GREEDY, assistant_models=[])
    assert ours.sequences.tolist() == plain.tolist()
