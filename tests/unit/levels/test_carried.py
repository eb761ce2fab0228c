# SPDX-License-Identifier: Apache-2.0
"""`num_assistant_tokens_schedule="heuristic"` goes on in the next call, "heuristic_transient" and "constant" do not."""

from __future__ import annotations

import copy
import gc
from typing import Any

import pytest
from tiny_models import head_for, noisy, prompts, tiny
from transformers import PreTrainedModel

import hf_polyspec
from hf_polyspec.levels import carried
from hf_polyspec.levels.carried import carried_sizes
from hf_polyspec.levels.tree_size import TreeSize

OPTIONS = {"max_new_tokens": 24, "do_sample": False, "return_dict_in_generate": True}


@pytest.fixture
def target() -> PreTrainedModel:
    return tiny("llama")


def rounds_of(target: PreTrainedModel, chain: list[Any], **options: Any) -> list[int]:
    """Rounds of the target in three calls: with an assistant that is always right, the fewer the longer the drafts."""
    found = []
    for _ in range(3):
        out = hf_polyspec.generate(target, **prompts(1), **OPTIONS, assistant_models=chain, **options)
        found.append(out.polyspec.levels[0].rounds)
    return found


@pytest.mark.parametrize("where", ["argument", "assistant's config"])
def test_lengths_are_carried_to_the_next_call_and_no_config_is_written_to(target, where):
    assistant = noisy(target, 0.0)
    options: dict[str, Any] = {}
    if where == "argument":
        options = {"num_assistant_tokens_schedule": "heuristic", "num_assistant_tokens": 2}
    else:
        assistant.generation_config.num_assistant_tokens_schedule = "heuristic"
        assistant.generation_config.num_assistant_tokens = 2
    config = copy.deepcopy(vars(assistant.generation_config))
    rounds = rounds_of(target, [assistant], **options)
    # 3 + 5 + 7 + 9 tokens; 11 + 13 where 10 drafted ones are remembered; 15 and the rest
    assert rounds == [4, 2, 2]
    assert vars(assistant.generation_config) == config


def test_what_is_remembered_is_transformers_own_number(target):
    """The same chain with transformers' assisted decoding, which writes its number into the assistant's config."""
    ours, theirs = noisy(target, 0.05, seed=4), noisy(target, 0.05, seed=4)
    theirs.generation_config.num_assistant_tokens_schedule = "heuristic"
    theirs.generation_config.num_assistant_tokens = 3
    theirs.generation_config.assistant_confidence_threshold = 0.0
    for _ in range(3):
        target.generate(**prompts(1), max_new_tokens=24, do_sample=False, assistant_model=theirs)
        hf_polyspec.generate(
            target, **prompts(1), **OPTIONS, assistant_models=[ours], num_assistant_tokens_schedule="heuristic",
            num_assistant_tokens=3,
        )  # fmt: skip
    ours_now = carried_sizes(ours, 3).draft_tokens
    # Drafts that the end of the text cuts short are counted otherwise there.
    assert ours_now is not None
    assert abs(ours_now - theirs.generation_config.num_assistant_tokens) <= 2
    assert ours_now != 3


@pytest.mark.parametrize("schedule", ["constant", "heuristic_transient"])
def test_other_schedules_begin_anew(target, schedule):
    options = {"num_assistant_tokens_schedule": schedule, "num_assistant_tokens": 2}
    rounds = rounds_of(target, [noisy(target, 0.0)], **options)
    assert len(set(rounds)) == 1


def test_another_number_asked_for_begins_anew(target):
    assistant = noisy(target, 0.0)
    one = {"num_assistant_tokens_schedule": "heuristic", "num_assistant_tokens": 2}
    first = rounds_of(target, [assistant], **one)
    other = rounds_of(target, [assistant], **{**one, "num_assistant_tokens": 1})
    assert other[0] >= first[0]
    assert rounds_of(target, [assistant], **one) == first


def test_the_depth_of_trees_is_carried_too(target):
    head = head_for(target)
    options = {"polyspec_tree_tokens": 8, "polyspec_tree_depth": 4, "num_assistant_tokens_schedule": "heuristic"}
    depths = []
    for _ in range(2):
        out = hf_polyspec.generate(target, **prompts(1), **OPTIONS, assistant_models=[head], **options)
        depths.append(out.polyspec.levels[1].mean_tree_depth)
    assert carried_sizes(head, 5, 8, 4).depth == 1, "an untrained head is hardly ever right"
    assert depths[0] > depths[1]
    assert TreeSize(4, 8, 1).depth == 1
    assert TreeSize(4, 8, 9).depth == 4
    assert TreeSize(4, 8).depth == 4


def test_nothing_is_remembered_of_an_assistant_that_is_gone(target, monkeypatch):
    monkeypatch.setattr(carried, "_sizes", type(carried._sizes)())  # what is remembered of others may go at any time
    assistant = noisy(target, 0.0)
    carried_sizes(assistant, 5).draft_tokens = 7
    assert carried_sizes(assistant, 5).draft_tokens == 7
    assert len(carried._sizes) == 1
    del assistant
    gc.collect()
    assert len(carried._sizes) == 0
