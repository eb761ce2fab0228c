# SPDX-License-Identifier: Apache-2.0
"""Caches and embeddings the caller brings: continued from, extended as plain generation extends them, usable after."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from tiny_models import noisy, prompts, tiny
from transformers import DynamicCache, PreTrainedModel

from hf_polyspec.host.release import GENERATION_CACHE, cache_of

NEW = 12
WINDOW = 6
PLAIN: dict[str, Any] = {"do_sample": False, "return_dict_in_generate": True}


@pytest.fixture(scope="module")
def sliding() -> PreTrainedModel:
    """A Mistral whose window is shorter than the texts."""
    return tiny("mistral", sliding_window=WINDOW)


@pytest.fixture(scope="module")
def sharing() -> PreTrainedModel:
    """A Gemma 3n whose later layers read the keys and values of earlier ones."""
    from architectures import ARCHITECTURES

    case = next(case for case in ARCHITECTURES if case.model_type == "gemma3n_text")
    return tiny(case.model_type, **case.settings)


def filled(model: PreTrainedModel, cache: DynamicCache, prompt: dict[str, torch.Tensor]) -> DynamicCache:
    """The cache after the first turn of a dialogue."""
    model.generate(**prompt, max_new_tokens=5, **{GENERATION_CACHE: cache}, do_sample=False)
    return cache


def same_cache(one: DynamicCache, other: DynamicCache, mask: torch.Tensor | None = None) -> None:
    """Same length; same keys and values wherever a token is. Old columns of sliding layers may be kept longer."""
    assert one.get_seq_length() == other.get_seq_length()
    for left, right in zip(one.layers, other.layers, strict=True):
        if left.keys is None:
            assert right.keys is None
            continue
        width = min(left.keys.shape[2], right.keys.shape[2])
        real = slice(None) if mask is None else mask[:, -width:].bool()
        for a, b in ((left.keys, right.keys), (left.values, right.values)):
            a, b = a[:, :, -width:].transpose(1, 2), b[:, :, -width:].transpose(1, 2)
            torch.testing.assert_close(a[real], b[real], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("ids", ["all", "new"])
@pytest.mark.parametrize("configured", [False, True], ids=["plain-cache", "cache-of-config"])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("kind", ["target", "sliding", "sharing"])
def test_the_second_turn_of_a_dialogue(enabled, request, kind, batch, configured, ids):
    """Turn one plain, turn two with a chain, turn three plain again from the chain's cache."""
    model = request.getfixturevalue(kind)
    chain = [noisy(model, 0.03, seed=1), noisy(model, 0.05, seed=2)]
    prompt = prompts(batch)
    start = filled(model, DynamicCache(config=model.config) if configured else DynamicCache(), prompt)
    past = start.get_seq_length()
    text = model.generate(**prompt, max_new_tokens=5, do_sample=False)
    turn = prompts(batch, length=4, seed=8)["input_ids"].clamp(min=3)
    whole = torch.cat([text, turn], dim=1)
    mask = torch.cat([prompt["attention_mask"], torch.ones(batch, whole.shape[1] - 9, dtype=torch.long)], dim=1)
    options = {
        "input_ids": whole if ids == "all" else whole[:, past:],
        "attention_mask": mask,
        "max_new_tokens": NEW,
        **PLAIN,
    }
    caches = [copy.deepcopy(start), copy.deepcopy(start)]
    plain = model.generate(**options, **{GENERATION_CACHE: caches[0]})
    ours = model.generate(
        **options,
        **{GENERATION_CACHE: caches[1]},
        assistant_models=chain,
        polyspec_block_size=4,
        num_assistant_tokens=3,
    )
    assert ours.sequences.tolist() == plain.sequences.tolist()
    assert cache_of(ours) is caches[1]
    grown = torch.cat([mask, torch.ones(batch, NEW - 1, dtype=torch.long)], dim=1)
    same_cache(caches[1], caches[0], grown)
    # The third turn: plain generation goes on from what the chain left.
    text = torch.cat([whole[:, : past if ids == "new" else 0], plain.sequences], dim=1)
    more = {
        "input_ids": text,
        "attention_mask": torch.cat([grown, torch.ones(batch, 1, dtype=torch.long)], dim=1),
        "max_new_tokens": 6,
        "do_sample": False,
    }
    third = [model.generate(**more, **{GENERATION_CACHE: cache}) for cache in caches]
    assert third[1].tolist() == third[0].tolist()


@pytest.mark.parametrize("ids", ["all", "new"])
def test_a_long_second_turn_in_chunks(target, generate, ids):
    start = filled(target, DynamicCache(), prompts(2))
    text = target.generate(**prompts(2), max_new_tokens=5, do_sample=False)
    text = torch.cat([text, prompts(2, length=11, seed=8)["input_ids"].clamp(min=3)], dim=1)
    mask = torch.cat([prompts(2)["attention_mask"], torch.ones(2, text.shape[1] - 9, dtype=torch.long)], dim=1)
    options = {
        "input_ids": text if ids == "all" else text[:, start.get_seq_length() :],
        "attention_mask": mask,
        "max_new_tokens": NEW,
        "do_sample": False,
    }
    plain = target.generate(**options, **{GENERATION_CACHE: copy.deepcopy(start)})
    ours = generate(target, **options, **{GENERATION_CACHE: copy.deepcopy(start)}, prefill_chunk_size=4)
    assert ours.tolist() == plain.tolist()


def test_a_cache_that_is_returned_can_be_continued_from(target, generate):
    """Nobody passed a cache: the one in the output is as good as plain generation's, rows that ended early included."""
    prompt = prompts(3)
    texts = target.generate(**prompt, max_new_tokens=NEW, do_sample=False)[:, 9:].tolist()
    options = {**prompt, "max_new_tokens": NEW, **PLAIN, "eos_token_id": texts[0][4], "pad_token_id": 2}
    plain, ours = target.generate(**options), generate(target, **options)
    assert ours.sequences.tolist() == plain.sequences.tolist()
    assert type(cache_of(ours)) is type(cache_of(plain))
    # Columns after a row's end are fed with pads by plain generation and hold nothing that is looked at.
    ended = torch.cat([prompt["attention_mask"], (plain.sequences[:, 9:-1] != 2).long()], dim=1)
    same_cache(cache_of(ours), cache_of(plain), ended)


def test_an_empty_cache_of_the_callers_is_filled(target, generate):
    options = {**prompts(1), "max_new_tokens": NEW, **PLAIN}
    caches = DynamicCache(), DynamicCache()
    plain = target.generate(**options, **{GENERATION_CACHE: caches[0]})
    ours = generate(target, **options, **{GENERATION_CACHE: caches[1]})
    assert ours.sequences.tolist() == plain.sequences.tolist()
    assert cache_of(ours) is caches[1]
    same_cache(caches[1], caches[0])


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize(
    "options",
    [{"use_cache": False}, {"cache_implementation": "static"}, {"prefill_chunk_size": 4}, {"prefill_chunk_size": 64}],
    ids=str,
)
def test_ways_of_caching(target, generate, options, batch):
    options = {**prompts(batch), "max_new_tokens": NEW, "do_sample": False, **options}
    assert generate(target, **options).tolist() == target.generate(**options).tolist()


@pytest.mark.parametrize("batch", [1, 3])
def test_chunks_of_a_prompt_with_windows(enabled, sliding, batch):
    options = {**prompts(batch, length=17), "max_new_tokens": NEW, "do_sample": False, "prefill_chunk_size": 5}
    chain = [noisy(sliding, 0.03), noisy(sliding, 0.05)]
    assert sliding.generate(**options, assistant_models=chain).tolist() == sliding.generate(**options).tolist()


@pytest.mark.parametrize("width", [32, 24], ids=["same-width", "other-width"])
@pytest.mark.parametrize("batch", [1, 3])
def test_inputs_embeds(target, middle, enabled, width, batch):
    """An assistant of the target's width reads the embeddings; one of another width starts from what is generated."""
    prompt = prompts(batch)
    embeds = target.get_input_embeddings()(prompt["input_ids"]).detach()
    drafter = noisy(target, 0.05, seed=2) if width == 32 else tiny("llama", hidden_size=width, num_attention_heads=2)
    options = {
        "inputs_embeds": embeds,
        "attention_mask": prompt["attention_mask"],
        "max_new_tokens": NEW,
        "do_sample": False,
    }
    plain = target.generate(**options)
    ours = target.generate(**options, assistant_models=[middle, drafter], num_assistant_tokens=3)
    assert ours.tolist() == plain.tolist()
    assert ours.shape[1] == NEW


def test_dialogue_with_a_chain_in_every_turn(target, generate):
    """Three turns with one cache, all through the chain, against three turns of plain generation."""
    caches = DynamicCache(), DynamicCache()
    texts = [prompts(1)["input_ids"]] * 2
    for turn in range(3):
        plain = target.generate(texts[0], **{GENERATION_CACHE: caches[0]}, max_new_tokens=6, do_sample=False)
        ours = generate(target, input_ids=texts[1], **{GENERATION_CACHE: caches[1]}, max_new_tokens=6, do_sample=False)
        assert ours.tolist() == plain.tolist()
        more = prompts(1, length=3, seed=20 + turn)["input_ids"]
        texts = [torch.cat([text, more], dim=1) for text in (plain, ours)]
        same_cache(caches[1], caches[0])
