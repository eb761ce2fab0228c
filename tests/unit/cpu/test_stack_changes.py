# SPDX-License-Identifier: Apache-2.0
"""Blocks computed together see what is changed between passes, and share nothing with copies and other models."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import nn

from hf_polyspec.cpu.compiled import compiles

if not compiles():
    pytest.skip("compiled functions do not run here", allow_module_level=True)

from stacked_blocks import DEPTH, IDS, Tiny, learned, packed_model, passes, run, same, together

from hf_polyspec.cpu.packing import packed_assistants
from hf_polyspec.quantization import is_packed, pack, unpack


def _double(model: Any) -> None:
    model.model.layers[3].mlp.gate_proj.weight.data.mul_(2)  # counted by nobody; the packed product is of a copy


def _replace(model: Any) -> None:
    layer = model.model.layers[3].self_attn.o_proj
    layer.weight = nn.Parameter(layer.weight.detach() * 2)


def _swap(model: Any) -> None:
    weight = model.model.layers[3].self_attn.q_proj.weight
    weight.data = weight.data * 2


def _norm(model: Any) -> None:
    model.model.layers[4].post_attention_layernorm.weight.data.mul_(2)


def _new_norm(model: Any) -> None:
    model.model.layers[1].input_layernorm.weight = nn.Parameter(torch.full((32,), 0.5))


def _epsilon(model: Any) -> None:
    model.model.layers[1].input_layernorm.variance_epsilon = 0.5


def _scaling(model: Any) -> None:
    model.model.layers[2].self_attn.scaling *= 2


def _module(model: Any) -> None:
    model.model.layers[2].mlp = copy.deepcopy(model.model.layers[1].mlp)


def _forward(model: Any) -> None:
    model.model.layers[2].mlp.forward = lambda x: x * 2


def _training(model: Any) -> None:
    layer = model.model.layers[2].train()
    layer.self_attn.attention_dropout = 0.0


CHANGES = [_double, _replace, _swap, _norm, _new_norm, _epsilon, _scaling, _module, _forward]


@pytest.mark.parametrize("change", CHANGES)
@torch.no_grad()
def test_what_is_changed_between_passes_is_seen(tiny: Tiny, change: Callable[[Any], None]) -> None:
    model = packed_model(tiny)
    cache = learned(model)
    before = run(model, IDS[:1, 40:43], cache)
    plain = unpack(copy.deepcopy(model))
    change(model)
    change(plain)
    cache.shrink(40)
    wanted = run(plain, IDS[:1, 40:43], copy.deepcopy(cache))
    assert (wanted - before).abs().max() > 1e-3
    torch.testing.assert_close(run(model, IDS[:1, 40:43], cache), wanted, rtol=1e-4, atol=1e-4)


def test_a_layer_in_training_goes_its_own_way(tiny: Tiny, tasks: list[int]) -> None:
    model = packed_model(tiny)
    cache = learned(model)
    _training(model)
    tasks.clear()
    run(model, IDS[:1, 40:43], cache)
    assert tasks == [2, 2], "those before it and those behind it do not"


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_stand_alone(tiny: Tiny, copied: Callable[[nn.Module], nn.Module], tasks: list[int]) -> None:
    model = packed_model(tiny)
    wanted = passes(model)
    other = copied(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    same(passes(other), wanted)
    tasks.clear()
    same(passes(other), wanted)
    together(tasks)


def test_unpacking_restores_the_layers(tiny: Tiny, tasks: list[int]) -> None:
    plain = copy.deepcopy(tiny("llama", initializer_range=0.1, num_hidden_layers=DEPTH))
    wanted, attributes = passes(plain), [set(module.__dict__) for module in plain.modules()]
    passes(pack(plain))
    assert DEPTH in tasks
    tasks.clear()
    same(passes(unpack(plain)), wanted)
    assert not tasks
    assert not is_packed(plain)
    assert [set(module.__dict__) for module in plain.modules()] == attributes


def test_assistants_are_stacked_while_they_run(tiny: Tiny, tasks: list[int]) -> None:
    model = copy.deepcopy(tiny("llama", initializer_range=0.1, num_hidden_layers=DEPTH))
    wanted = passes(model)[0]
    for _ in range(2):
        tasks.clear()
        with packed_assistants([model]):
            for one, other in zip(passes(model)[0], wanted, strict=True):
                torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
        assert tasks[-1] == DEPTH


def test_assistants_that_ran_before_are_stacked_from_the_first_pass(tiny: Tiny, tasks: list[int]) -> None:
    model = tiny("llama", initializer_range=0.1, num_hidden_layers=DEPTH)
    with packed_assistants([model]), packed_assistants([model]):  # as a plan does around the calls it makes
        cache = learned(model)
    tasks.clear()
    with packed_assistants([model]):
        run(model, IDS[:1, 40:41], cache)
    assert tasks == [DEPTH], "its layers knew each other"


def test_a_part_replaced_between_two_generations_is_met_anew(tiny: Tiny, tasks: list[int]) -> None:
    model = tiny("llama", initializer_range=0.1, num_hidden_layers=DEPTH)
    with packed_assistants([model]):
        passes(model)
    before = model.model.layers[1].input_layernorm
    model.model.layers[1].input_layernorm = copy.deepcopy(before)
    model.model.layers[1].input_layernorm.weight = nn.Parameter(before.weight.detach() * 2)
    wanted = passes(model)[0]
    tasks.clear()
    with packed_assistants([model]):
        found = passes(model)[0]
    assert tasks[-1] == DEPTH
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_an_assistant_that_ran_can_be_forgotten(tiny: Tiny) -> None:
    model = copy.deepcopy(tiny("llama", initializer_range=0.1, num_hidden_layers=DEPTH))
    with packed_assistants([model]):
        passes(model)
    layer = weakref.ref(model.model.layers[0])
    del model
    gc.collect()
    assert layer() is None


def test_threads(tiny: Tiny, tasks: list[int]) -> None:
    model = packed_model(tiny)
    passes(model, 3)
    wanted = [passes(model, rows) for rows in (1, 2, 3)]
    tasks.clear()
    with ThreadPoolExecutor(4) as pool:
        for n, found in enumerate(pool.map(lambda n: passes(model, 1 + n % 3), range(24))):
            same(found, wanted[n % 3])
    assert set(tasks) == {1, DEPTH}
    assert tasks.count(1) == 24 * DEPTH, "the first pass of each"


def test_two_models_in_turn(tiny: Tiny, tasks: list[int]) -> None:
    one, other = packed_model(tiny), packed_model(tiny, "bfloat16", depth=3)
    wanted = passes(one), passes(other)
    caches = learned(one), learned(other)
    tasks.clear()
    for n in range(40, 44):
        run(one, IDS[:1, n : n + 1], caches[0])
        run(other, IDS[:1, n : n + 1], caches[1])
    assert tasks == [DEPTH, 3] * 4
    same(passes(one), wanted[0])
    same(passes(other), wanted[1])
