# SPDX-License-Identifier: Apache-2.0
"""Offloaded caches: cut where they rest, handed back as plain generation would have left them, continued from.

transformers' own need the streams of an accelerator; here those are stand-ins, and the host's memory is the device too.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from tiny_models import head_for, noisy, prompts, tiny
from transformers import DynamicCache, StaticCache, cache_utils

from hf_polyspec import SuffixDrafter
from hf_polyspec.errors import UncheckableError
from hf_polyspec.host.cache import RollbackLayer
from hf_polyspec.host.compatibility import check_cache_implementation
from hf_polyspec.host.offloaded import OffloadedCache, OffloadedLayer, check_offloaded
from hf_polyspec.host.release import GENERATION_CACHE, cache_argument

CALL = {"max_new_tokens": 12, "do_sample": False, "return_dict_in_generate": True}


class Stream(nullcontext[None]):
    def wait_stream(self, _: Any) -> None: ...

    def synchronize(self) -> None: ...


@pytest.fixture
def streams(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "default_stream", lambda *_: Stream())


def chains(model: Any) -> list[dict[str, Any]]:
    return [
        {"assistant_models": [noisy(model, 0.05)]},
        {"assistant_models": [noisy(model, 0.03), SuffixDrafter(min_match=1)]},
        {"assistant_models": [head_for(model)], "polyspec_tree_tokens": 20, "polyspec_tree_top_k": 10},
    ]


def held(output: Any, mask: torch.Tensor) -> list[torch.Tensor]:
    found = []
    for layer in getattr(output, GENERATION_CACHE).layers:
        for states in (layer.keys, layer.values):
            seen = torch.ones(mask.shape[0], states.shape[2])
            seen[:, : mask.shape[1]] = mask
            found.append(states * seen[:, None, :, None])
    return found


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("kind", ["offloaded", "offloaded_static"])
def test_caches_that_generate_prepares(enabled: None, streams: None, kind: str, batch: int) -> None:
    model = tiny()
    inputs = prompts(batch)
    plain = model.generate(**inputs, **CALL, cache_implementation=kind)
    for chain in chains(model):
        found = model.generate(**inputs, **CALL, cache_implementation=kind, **chain)
        assert found.sequences.tolist() == plain.sequences.tolist()
        assert getattr(found, GENERATION_CACHE).offloading
        for one, other in zip(
            held(found, inputs["attention_mask"]), held(plain, inputs["attention_mask"]), strict=True
        ):
            torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("batch", [1, 3])
def test_the_target_rests_in_the_hosts_memory(
    enabled: None, streams: None, batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the number of rows, and no level below takes keys from there."""
    model = tiny()
    seen: list[Any] = []
    update = OffloadedLayer.update
    monkeypatch.setattr(OffloadedLayer, "update", lambda self, *a, **k: seen.append(self) or update(self, *a, **k))
    found = model.generate(
        **prompts(batch, length=50),
        **CALL,
        cache_implementation="offloaded",
        assistant_models=[noisy(model, 0.0)],
    )
    layers = 2 * found.polyspec.levels[0].forward_passes
    assert len(seen) == layers
    assert len(set(map(id, seen))) == 2
    assert not OffloadedCache().lends


@pytest.mark.parametrize("kind", ["llama", "gemma3_text"])
def test_a_second_turn(enabled: None, streams: None, kind: str) -> None:
    """The caller's own cache, filled by a first turn; layers with windows too."""
    more = {"sliding_window": 8, "head_dim": 8, "layer_types": ["sliding_attention", "full_attention"]}
    model = tiny(kind, **(more if kind != "llama" else {}))
    name, ids = cache_argument(model) or "", prompts(2, length=14)["input_ids"]

    def turns(**chain: Any) -> list[list[int]]:
        cache = DynamicCache(config=model.config, offloading=True)
        first = model.generate(ids[:, :6].clamp(min=3), **CALL, **{name: cache}, **chain)
        text = torch.cat([first.sequences, ids[:, 6:].clamp(min=3)], dim=1)
        found: list[list[int]] = model.generate(text, **CALL, **{name: cache}, **chain).sequences.tolist()
        return found

    assert turns(assistant_models=[noisy(model, 0.05)]) == turns()


def test_columns_are_those_of_a_layer_on_the_device() -> None:
    """After a cut, too; and what a pass is given is where its new columns are."""
    layers = OffloadedLayer(), RollbackLayer()
    dice = torch.Generator().manual_seed(1)
    for fed in (5, 3, 4):
        new = [torch.randn(2, 2, fed, 4, generator=dice) for _ in range(2)]
        mine, theirs = (layer.update(*new) for layer in layers)
        for one, other in zip(mine, theirs, strict=True):
            assert torch.equal(one, other)
        assert layers[0].visited == new[0].device
        for layer in layers:
            layer.shrink(layer.get_seq_length() - 2)


def test_what_keeps_more_than_keys_and_values_is_told_of(streams: None) -> None:
    model = tiny("mamba2", state_size=8, num_heads=4, head_dim=16, n_groups=1, chunk_size=8, attention="eager")
    with pytest.raises(UncheckableError, match=r"the target \(Mamba2ForCausalLM\) keeps more .* without offloading"):
        check_offloaded(DynamicCache(config=model.config, offloading=True), model)


def test_behind_quantised_caches_the_target_generates_alone(enabled: None, target: Any) -> None:
    """Its keys and values are rounded as plain generation's are, so the text is plain's."""
    with pytest.raises(UncheckableError, match="'quantized' is rounded as it grows and cannot be rolled back"):
        check_cache_implementation("quantized")
    with pytest.raises(ValueError, match="'paged' is not known here"):
        target.generate(**prompts(1), **CALL, cache_implementation="paged", assistant_models=[SuffixDrafter()])
    if not hasattr(cache_utils, "Fp8QuantizedLayer"):
        return  # older releases quantise with other packages only
    name = cache_argument(target) or ""
    for words, make in (
        ("'quantized' is rounded", lambda: {"cache_implementation": "quantized", "cache_config": {"backend": "fp8"}}),
        (
            "QuantizedCache has Fp8QuantizedLayer layers, which cannot be rolled back",
            lambda: {name: cache_utils.QuantizedCache(backend="fp8", config=target.config)},
        ),
    ):
        plain = target.generate(**prompts(1), **CALL, **make())
        with pytest.warns(UserWarning, match=words):
            got = target.generate(**prompts(1), **CALL, **make(), assistant_models=[SuffixDrafter()])
        assert got.sequences.tolist() == plain.sequences.tolist()


def test_a_static_cache_that_is_moved_keeps_its_tensors_size(enabled: None, streams: None) -> None:
    model = tiny()
    cache = StaticCache(config=model.config, max_cache_len=40, offloading=True)
    model.generate(
        **prompts(1), **CALL, **{cache_argument(model) or "": cache}, assistant_models=[SuffixDrafter(min_match=1)]
    )
    assert {layer.keys.shape[2] for layer in cache.layers} == {40}
    assert int(cache.get_seq_length()) == 9 + 11
