# SPDX-License-Identifier: Apache-2.0
"""Properties over options, prompts, lengths, ends and shapes of chains: output equals plain generation, and every
cache holds exactly the ids it is said to hold (law 4)."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_models import VOCABULARY, noisy, tiny
from transformers import DynamicCache, PreTrainedModel
from watched_passes import watched_caches, watched_passes

import hf_polyspec
from hf_polyspec.host.release import GENERATION_CACHE, cache_of
from hf_polyspec.host.runner import ModelRunner
from hf_polyspec.levels.suffix import SuffixDrafter

WINDOWS = {"sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"], "head_dim": 8}
KINDS: dict[str, dict[str, Any]] = {"llama": {}, "gpt2": {}, "mistral": {"sliding_window": 5}, "gemma3_text": WINDOWS}
# The same examples every time: a test that fails now and then tells nobody anything.
FIXED = settings(
    max_examples=80, derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow], database=None
)


@lru_cache(maxsize=8)
def family(kind: str) -> tuple[PreTrainedModel, PreTrainedModel, PreTrainedModel]:
    """A target, a middle and a drafter."""
    target = tiny(kind, **KINDS[kind])
    return target, noisy(target, 0.03, seed=1), noisy(target, 0.06, seed=2)


@st.composite
def requests(draw: st.DrawFn) -> dict[str, Any]:
    """What a caller may ask for: prompts with padding, lengths, ends, processors, caching."""
    batch = draw(st.integers(1, 4))
    lengths = draw(st.lists(st.integers(1, 10), min_size=batch, max_size=batch))
    width = max(lengths)
    ids, mask = torch.zeros(batch, width, dtype=torch.long), torch.zeros(batch, width, dtype=torch.long)
    for row, length in enumerate(lengths):
        tokens = draw(st.lists(st.integers(3, VOCABULARY - 1), min_size=length, max_size=length))
        ids[row, width - length :] = torch.tensor(tokens)
        mask[row, width - length :] = 1
    options: dict[str, Any] = {"input_ids": ids, "attention_mask": mask, "pad_token_id": 0, "do_sample": False}
    options["max_new_tokens"] = draw(st.integers(1, 18))
    ends = draw(st.lists(st.integers(1, VOCABULARY - 1), max_size=6, unique=True))
    if ends:
        options["eos_token_id"] = ends
        if draw(st.booleans()):
            options["min_new_tokens"] = draw(st.integers(1, options["max_new_tokens"]))
    if draw(st.booleans()):
        options["repetition_penalty"] = draw(st.sampled_from([1.1, 1.5, 0.9]))
    if draw(st.booleans()):
        options["no_repeat_ngram_size"] = draw(st.integers(1, 3))
    if draw(st.integers(0, 4)) == 0:
        options["use_cache"] = False
    if draw(st.integers(0, 4)) == 0:
        options["return_dict_in_generate"] = True
        options["output_scores"] = draw(st.booleans())
    if draw(st.integers(0, 6)) == 0 and "use_cache" not in options:
        options["cache_implementation"] = "static"
    return options


@st.composite
def continued(draw: st.DrawFn) -> dict[str, Any]:
    """Such a request whose caller has read the beginning of the prompt before, and brings the cache of it."""
    options: dict[str, Any] = draw(requests())
    options.pop("use_cache", None)
    options.pop("cache_implementation", None)
    width = options["input_ids"].shape[1]
    if width > 1:
        options["held"] = draw(st.integers(1, width - 1))
        options["configured"] = draw(st.booleans())
        options["only_new"] = draw(st.booleans())
    return options


@torch.no_grad()
def with_cache_of_beginning(model: PreTrainedModel, request: dict[str, Any]) -> dict[str, Any]:
    """generate()'s arguments for a request of `continued`, with a cache of its own at every call."""
    given = {name: value for name, value in request.items() if name not in ("held", "configured", "only_new")}
    held = request.get("held")
    if held:
        cache = DynamicCache(config=model.config) if request["configured"] else DynamicCache()
        mask = given["attention_mask"][:, :held]
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        ids = given["input_ids"][:, :held]
        model(input_ids=ids, attention_mask=mask, position_ids=positions, **{GENERATION_CACHE: cache})
        given[GENERATION_CACHE] = cache
        if request["only_new"]:
            given["input_ids"] = given["input_ids"][:, held:]
    return given


@st.composite
def chains(draw: st.DrawFn) -> dict[str, Any]:
    """Which levels, and how they behave."""
    return {
        "levels": draw(st.sampled_from(["d", "m", "md", "mm", "mmd", "s", "ms", "mds"])),
        "num_assistant_tokens": draw(st.integers(1, 7)),
        "polyspec_block_size": draw(st.integers(1, 9)),
        "polyspec_verification": draw(st.sampled_from(["auto", "token", "block"])),
        "num_assistant_tokens_schedule": draw(st.sampled_from(["constant", "heuristic"])),
        "assistant_confidence_threshold": draw(st.sampled_from([0.0, 0.3, 0.9])),
    }


def check(kind: str, request: dict[str, Any], chain: dict[str, Any]) -> Any:
    target, middle, drafter = family(kind)
    members = {"m": lambda: middle, "d": lambda: drafter, "s": SuffixDrafter}
    options = {name: value for name, value in chain.items() if name != "levels"}
    given, known = with_cache_of_beginning(target, request), with_cache_of_beginning(target, request)
    plain = target.generate(**known)
    hf_polyspec.enable()
    try:
        with watched_caches() as lengths:
            ours = target.generate(**given, **options, assistant_models=[members[c]() for c in chain["levels"]])
    finally:
        hf_polyspec.disable()
    if request.get("return_dict_in_generate"):
        assert type(ours) is type(plain)
        assert len(ours.scores or ()) == len(plain.scores or ())
        assert ours.polyspec.new_tokens <= plain.sequences.numel()
        ours, plain = ours.sequences, plain.sequences
    assert ours.tolist() == plain.tolist()
    if "held" in request:
        mine, theirs = given[GENERATION_CACHE], known[GENERATION_CACHE]
        assert [layer.get_seq_length() for layer in mine.layers] == [layer.get_seq_length() for layer in theirs.layers]
        assert [layer.keys.shape for layer in mine.layers] == [layer.keys.shape for layer in theirs.layers]
    return lengths


@pytest.mark.parametrize("kind", KINDS)
def test_any_request_through_any_chain_gives_plain_generations_text(kind):
    @FIXED
    @given(requests(), chains())
    def holds(request: dict[str, Any], chain: dict[str, Any]) -> None:
        check(kind, request, chain)

    holds()


@pytest.mark.parametrize("kind", KINDS)
def test_any_request_goes_on_from_any_cache_of_its_beginning(kind):
    """Windows that have let old columns go among them; the cache is as long as plain generation leaves it."""

    @settings(FIXED, max_examples=40)
    @given(continued(), chains())
    def holds(request: dict[str, Any], chain: dict[str, Any]) -> None:
        check(kind, request, chain)

    holds()


def test_an_end_in_every_place_of_every_block():
    """Ends taken from the text itself, so that they do occur, for rows of a batch at different places."""

    @settings(FIXED, max_examples=60)
    @given(st.data())
    def holds(data: st.DataObject) -> None:
        kind = data.draw(st.sampled_from(["llama", "mistral"]))
        request = data.draw(st.one_of(requests(), continued()))
        target = family(kind)[0]
        request.pop("eos_token_id", None)
        request.pop("min_new_tokens", None)
        dicts = {name: request.pop(name) for name in ("return_dict_in_generate", "output_scores") if name in request}
        new = target.generate(**with_cache_of_beginning(target, request))[:, -request["max_new_tokens"] :]
        request.update(dicts)
        rows = data.draw(st.lists(st.integers(0, new.shape[0] - 1), min_size=1, max_size=3))
        places = [data.draw(st.integers(0, new.shape[1] - 1)) for _ in rows]
        request["eos_token_id"] = [int(new[row, place]) for row, place in zip(rows, places, strict=True)]
        check(kind, request, data.draw(chains()))

    holds()


def test_caches_hold_what_their_ids_say():
    """Keys of every level, rolled back and realigned many times, against keys of a fresh pass over the same ids."""
    target, middle, drafter = family("mistral")
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, VOCABULARY, (3, 7), generator=generator)
    checked = {"rows": 0}

    def look(runner: ModelRunner, *_: Any) -> None:
        cache = runner.plain_cache()
        for row, held in enumerate(runner.memo):
            fresh = cache_of(runner.model(input_ids=torch.tensor([held]), use_cache=True))
            # A cache with a window keeps fewer columns; those it keeps must agree.
            for mine, theirs in zip(cache.layers, fresh.layers, strict=True):
                width = min(theirs.keys.shape[2], len(held))
                start = cache.length - width
                torch.testing.assert_close(mine.keys[row, :, start:], theirs.keys[0, :, -width:], rtol=1e-4, atol=1e-4)
            checked["rows"] += 1

    hf_polyspec.enable()
    try:
        with torch.no_grad(), watched_passes(look):
            target.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=14,
                do_sample=False,
                assistant_models=[middle, drafter],
                polyspec_block_size=3,
            )
    finally:
        hf_polyspec.disable()
    assert checked["rows"] > 30
