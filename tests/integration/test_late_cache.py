# SPDX-License-Identifier: Apache-2.0
"""The cache in an output is filled when it is looked at, and whoever looks sees plain generation's."""

from __future__ import annotations

import copy
import gc
import operator
import pickle
import threading
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny_models import noisy, prompts, tiny
from transformers import DynamicCache

import hf_polyspec
from hf_polyspec.host import late_layers
from hf_polyspec.host.late_layers import LateLayers
from hf_polyspec.host.release import GENERATION_CACHE, cache_of
from hf_polyspec.host.runner import ModelRunner

WIDTH, NEW = 11, 16
PATIENCE = 240.0
"""Seconds within which anything happens, however busy the machine."""


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny("llama")


def written(model: Any, levels: list[Any] | None, **more: Any) -> Any:
    """Greedy texts of three prompts, some of which end early."""
    end = tiny("llama").generate(**prompts(3, WIDTH), max_new_tokens=NEW, do_sample=False)[0, WIDTH + 4]
    call = {**prompts(3, WIDTH), "max_new_tokens": NEW, "eos_token_id": int(end), "do_sample": False, **more}
    call["return_dict_in_generate"] = True
    output = model.generate(**call) if levels is None else hf_polyspec.generate(model, assistant_models=levels, **call)
    assert (output.sequences[0, WIDTH + 5 :] == 0).all()
    return output


def numbers(layers: Any) -> list[torch.Tensor]:
    """Keys and values behind the prompts, whose padding is nobody's; pads behind an end included."""
    return [states[:, :, WIDTH:] for layer in layers for states in (layer.keys, layer.values)]


LOOKS: dict[str, Callable[[Any], Any]] = {
    "one by one": lambda cache: [cache.layers[i] for i in range(len(cache.layers))],
    "from the end": lambda cache: list(reversed(list(reversed(cache.layers)))),
    "through the cache": lambda cache: cache.get_seq_length() and cache.layers,
    "a copy": lambda cache: copy.copy(cache).layers,
    "a deep copy": lambda cache: copy.deepcopy(cache).layers,
    "a deep copy of the layers": lambda cache: copy.deepcopy(cache.layers),
    "in a file": lambda cache: pickle.loads(pickle.dumps(cache)).layers,
    "added": lambda cache: operator.add(operator.add([], cache.layers), []),
    "in words": lambda cache: repr(cache) and cache.layers,
}


@pytest.mark.parametrize("look", LOOKS)
def test_whoever_looks_sees_plain_generations(model: Any, look: str) -> None:
    cache = cache_of(written(model, [noisy(model)]))
    assert type(cache) is DynamicCache
    assert type(cache.layers) is LateLayers
    wanted = numbers(cache_of(written(model, None)).layers)
    for seen, plain in zip(numbers(LOOKS[look](cache)), wanted, strict=True):
        torch.testing.assert_close(seen, plain, rtol=1e-4, atol=1e-4)
    assert type(LOOKS[look](cache)) is list or look == "a copy"


def test_what_is_done_to_the_layers_is_done_to_the_cache(model: Any) -> None:
    cache = cache_of(written(model, []))
    layers, last = cache.layers, cache.layers[-1]
    assert type(cache.layers) is list
    assert layers == cache.layers
    layers.append(layers.pop())
    layers[0] = layers[0]
    assert cache.layers[-1] is last
    del layers[0]
    assert len(cache.layers) == 1


def test_nobody_looks_and_nothing_is_done(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    settled: list[Any] = []
    monkeypatch.setattr(ModelRunner, "settle", lambda *given: settled.append(given))
    output = written(model, [noisy(model)])
    gone = weakref.ref(cache_of(output).layers), weakref.ref(cache_of(output))
    assert not settled
    gc.disable()
    try:
        del output
        assert [one() for one in gone] == [None, None], "nothing of it waits for the collector"
    finally:
        gc.enable()


@pytest.mark.parametrize("case", ["a caller's", "static", "in training", "autocast"])
def test_where_it_could_make_a_difference_nothing_is_left_for_later(model: Any, case: str) -> None:
    target = copy.deepcopy(model)
    more: dict[str, Any] = {}
    if case == "a caller's":
        more[GENERATION_CACHE] = DynamicCache()
    if case == "static":
        more["cache_implementation"] = "static"
    if case == "in training":
        target.train()
    with torch.autocast("cpu", enabled=case == "autocast"):
        output = written(target, [], **more)
    assert type(cache_of(output).layers) is list
    assert cache_of(output).get_seq_length() == output.sequences.shape[1] - 1


def test_a_model_that_has_changed_meanwhile_is_told_of(model: Any) -> None:
    target = copy.deepcopy(model)
    output = written(target, [])
    with torch.no_grad():
        target.model.norm.weight.mul_(2)
    with pytest.warns(UserWarning, match="the model has changed between generate"):
        assert len(cache_of(output).layers) == 2
    # Rows that end together lack nothing, so that nothing is read by the model as it is by then.
    call = {**prompts(3, WIDTH), "max_new_tokens": NEW, "do_sample": False, "return_dict_in_generate": True}
    output = hf_polyspec.generate(target, assistant_models=[], **call)
    with torch.no_grad():
        target.model.norm.weight.mul_(0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert cache_of(output).get_seq_length() == WIDTH + NEW - 1


def test_two_threads_look_and_it_is_filled_once() -> None:
    cache, entered, go = DynamicCache(), threading.Event(), threading.Event()
    filled: list[Any] = []

    def fill(beside: Any) -> None:
        filled.append(beside)
        entered.set()
        assert go.wait(PATIENCE)
        beside.update(torch.ones(1, 1, 2, 1), torch.ones(1, 1, 2, 1), 0)

    late_layers.fill_late(cache, fill)
    seen: list[int] = []
    threads = [threading.Thread(target=lambda: seen.append(cache.get_seq_length())) for _ in range(2)]
    threads[0].start()
    assert entered.wait(PATIENCE)
    threads[1].start()
    go.set()
    for thread in threads:
        thread.join(PATIENCE)
    assert seen == [2, 2]
    assert len(filled) == 1


def test_what_fails_is_tried_again() -> None:
    cache, failures = DynamicCache(), [RuntimeError("no memory")]

    def fill(beside: Any) -> None:
        if failures:
            raise failures.pop()
        beside.update(torch.ones(1, 1, 3, 1), torch.ones(1, 1, 3, 1), 0)

    with torch.inference_mode():
        late_layers.fill_late(cache, fill)
    with pytest.raises(RuntimeError, match="no memory"):
        len(cache.layers)
    assert cache.get_seq_length() == 3
