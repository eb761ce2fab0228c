# SPDX-License-Identifier: Apache-2.0
"""Sparse attention, whose layers keep an indexer's keys beside their own, alone and beside layers with a state."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_models import noisy, prompts

from hf_polyspec.bench.measurements.tiny_models import tiny_model
from hf_polyspec.host.indexed import RollbackIndexedLayer
from hf_polyspec.host.modeling import CONFIG_MAPPING, AutoModelForCausalLM
from hf_polyspec.host.release import GENERATION_CACHE, cache_argument
from hf_polyspec.host.states import unknown_layer

NEW = 16
KINDS = [kind for kind in ("deepseek_v32", "qwen4_exp") if kind in CONFIG_MAPPING]


@pytest.fixture(scope="module", params=[f"{kind} {way}" for kind in KINDS for way in ("eager", "sdpa")])
def model(request: pytest.FixtureRequest) -> Any:
    """Each token attends to eight of the tokens before it, and texts are longer."""
    kind, attention = request.param.split()
    return tiny_model(kind, AutoModelForCausalLM, attention=attention)


def refused(model: Any) -> bool:
    """Whether drafts cannot be checked with this release's model; then it generates alone, and says why."""
    if unknown_layer(model) is None:
        return False
    with pytest.warns(UserWarning, match="keeps DynamicIndexedLayer layers in its cache, which cannot be cut"):
        model.generate(**prompts(1), max_new_tokens=2, assistant_models=[noisy(model, 0.05)])
    return True


@pytest.mark.parametrize("batch", [1, 3])
def test_greedy_text_is_plain_generations(enabled: None, model: Any, batch: int) -> None:
    if refused(model):
        return
    call = {**prompts(batch), "max_new_tokens": NEW, "do_sample": False}
    plain = model.generate(**call)
    for chain in ([noisy(model, 0.05)], [noisy(model, 0.02), noisy(model, 0.05, seed=2)]):
        found = model.generate(**call, assistant_models=chain, return_dict_in_generate=True)
        assert found.sequences.tolist() == plain.tolist()
        target = found.polyspec.levels[0]
        assert 0 < target.accepted < target.drafted


def test_the_cache_handed_back_goes_on_in_a_second_turn(enabled: None, model: Any) -> None:
    """What the indexer keeps is handed back with keys and values, and read again."""
    if refused(model):
        return
    call = {"max_new_tokens": 9, "do_sample": False, "return_dict_in_generate": True}
    chain = {"assistant_models": [noisy(model, 0.05)]}
    plain, found = model.generate(**prompts(1), **call), model.generate(**prompts(1), **call, **chain)
    held = [
        [layer for layer in one[GENERATION_CACHE].layers if hasattr(layer, "indexer_keys")] for one in (plain, found)
    ]
    assert held[0]
    for one, other in zip(*held, strict=True):
        torch.testing.assert_close(other.indexer_keys, one.indexer_keys, atol=1e-4, rtol=1e-4)
    ids = torch.cat([plain.sequences, torch.tensor([[5, 9, 4]])], dim=1)
    turn = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **call}
    name = cache_argument(model)
    second = model.generate(**turn, **{name: plain[GENERATION_CACHE]})
    again = model.generate(**turn, **{name: found[GENERATION_CACHE]}, **chain)
    assert again.sequences.tolist() == second.sequences.tolist()


def test_what_stands_beside_keys_follows_their_columns() -> None:
    layer = RollbackIndexedLayer()
    keys = torch.arange(2 * 5, dtype=torch.float32).view(2, 1, 5, 1)
    layer.update(keys, keys)
    layer.update_indexer(keys[:, 0])
    layer.indexer_position_ids = keys[None, :, 0, :, 0]

    def seen() -> list[list[list[float]]]:
        return [one.reshape(2, -1).tolist() for one in (layer.keys, layer.indexer_keys, layer.indexer_position_ids)]

    layer.gather(torch.tensor([[3], [4]]), 2)
    assert seen() == [[[0, 1, 3], [5, 6, 9]]] * 3
    layer.shift([(0, 1, 1), (1, 0, 2)], 2)
    assert [one[0][1] for one in seen()] == [0, 0, 0]
    assert [one[1] for one in seen()] == [[6, 9]] * 3
    layer.keep_rows(torch.tensor([1, 1]))
    layer.shrink(1)
    assert seen() == [[[6], [6]]] * 3


def test_a_static_cache_is_handed_back_with_what_the_indexer_keeps(enabled: None, model: Any) -> None:
    """Of the same size and numbers, and it goes on alike."""
    if refused(model):
        return
    call = {**prompts(2), "max_new_tokens": 9, "do_sample": False, "return_dict_in_generate": True}
    try:
        plain = model.generate(**call, cache_implementation="static")
    except ValueError:  # this release has no such cache of fixed size
        return
    found = model.generate(**call, cache_implementation="static", assistant_models=[noisy(model, 0.05)])
    seen = call["attention_mask"][:, None, :, None].bool()
    for mine, theirs in zip(found[GENERATION_CACHE].layers, plain[GENERATION_CACHE].layers, strict=True):
        assert type(mine) is type(theirs)
        for name in ("keys", "values", "indexer_keys"):
            one, other = getattr(mine, name, None), getattr(theirs, name, None)
            assert (one is None) == (other is None), name
            if one is not None:
                mask = (seen if one.ndim == 4 else seen[:, 0]).expand(*one.shape[:-2], seen.shape[2], one.shape[-1])
                assert one.shape == other.shape
                width = seen.shape[2]
                front = [where[..., :width, :].masked_select(mask) for where in (one, other)]
                torch.testing.assert_close(*front, rtol=1e-3, atol=1e-3)
                torch.testing.assert_close(one[..., width:, :], other[..., width:, :], rtol=1e-3, atol=1e-3)
