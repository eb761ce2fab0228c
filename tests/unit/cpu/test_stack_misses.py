# SPDX-License-Identifier: Apache-2.0
"""Blocks computed together step aside when they are called otherwise than expected."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hf_polyspec.cpu.compiled import compiles
from hf_polyspec.host.cache import RollbackCache

if not compiles():
    pytest.skip("compiled functions do not run here", allow_module_level=True)

from stacked_blocks import DEPTH, IDS, Tiny, learned, packed_model, passes, run, together

from hf_polyspec.levels.early_exit import early_exit
from hf_polyspec.quantization import unpack


class _Wrapped(nn.Module):
    """A layer whose output somebody changes: in place, or not."""

    def __init__(self, layer: nn.Module, in_place: bool) -> None:
        super().__init__()
        self.layer, self.in_place, self.active = layer, in_place, False

    def forward(self, x: Tensor, **given: Any) -> Tensor:
        found: Tensor = self.layer(x, **given)
        if not self.active:
            return found
        return found.mul_(1.5) if self.in_place else found * 1.5


@pytest.mark.parametrize("in_place", [True, False])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_states_changed_between_layers(
    tiny: Tiny, in_place: bool, mode: Callable[[], Any], tasks: list[int], one_by_one: Callable[..., Any]
) -> None:
    """Tensors of inference mode do not count changes."""
    model = packed_model(tiny)
    wrapped = model.model.layers[2] = _Wrapped(model.model.layers[2], in_place)
    with mode():
        cache = learned(model)
        wrapped.active = True
        wanted = one_by_one(lambda: run(model, IDS[:1, 40:43], cache))
        keys = [layer.keys.clone() for layer in cache.layers]
        found = []
        for _ in range(3):
            cache.shrink(40)
            tasks.clear()
            found.append((run(model, IDS[:1, 40:43], cache), list(tasks)))
            assert all(torch.equal(layer.keys, kept) for layer, kept in zip(cache.layers, keys, strict=True))
        assert all(torch.equal(logits, wanted) for logits, _ in found)
        assert [counts for _, counts in found] == [[DEPTH, 2], [3, 2], [3, 2]]


def test_a_hook_on_a_block_that_changes_its_output(
    tiny: Tiny, tasks: list[int], one_by_one: Callable[..., Any]
) -> None:
    model = packed_model(tiny)
    cache = learned(model)
    plain = run(model, IDS[:1, 40:43], cache)
    handle = model.model.layers[0].register_forward_hook(lambda _, __, output: output + 1)
    cache.shrink(40)
    wanted = one_by_one(lambda: run(model, IDS[:1, 40:43], cache))
    for _ in range(2):
        cache.shrink(40)
        assert torch.equal(run(model, IDS[:1, 40:43], cache), wanted)
    handle.remove()
    for _ in range(4):
        cache.shrink(40)
        tasks.clear()
        assert torch.equal(run(model, IDS[:1, 40:43], cache), plain)
    assert tasks == [DEPTH], "believed again after a while"


@pytest.mark.parametrize("inside", ["self_attn", "mlp.act_fn", "input_layernorm", "self_attn.q_proj"])
def test_a_hook_inside_a_later_layer_is_called(tiny: Tiny, inside: str, tasks: list[int]) -> None:
    model, seen = packed_model(tiny), []
    cache = learned(model)
    handle = model.model.layers[2].get_submodule(inside).register_forward_hook(lambda *_: seen.append(1))
    for _ in range(2):
        tasks.clear()
        run(model, IDS[:1, 40:41], cache)
    assert seen == [1, 1]
    assert tasks == [2, 2], "before and behind it"
    handle.remove()
    for _ in range(3):
        tasks.clear()
        run(model, IDS[:1, 40:41], cache)
    assert seen == [1, 1]
    assert tasks == [DEPTH]


def test_layers_that_are_left_out(tiny: Tiny, tasks: list[int]) -> None:
    """A model cut in place, with a cache of its own."""
    model = packed_model(tiny)
    cache = learned(model)
    whole = run(model, IDS[:1, 40:42], cache)
    layers, model.model.layers = model.model.layers, model.model.layers[:3]
    model.config.num_hidden_layers = 3
    short = learned(model)
    tasks.clear()
    cut = run(model, IDS[:1, 40:42], short)
    assert tasks == [3], "its cache tells how deep it is"
    assert not torch.equal(cut, whole)
    model.model.layers, model.config.num_hidden_layers = layers, DEPTH
    cache.shrink(40)
    assert torch.equal(run(model, IDS[:1, 40:42], cache), whole)


@torch.no_grad()
def test_a_pass_that_ends_early_wastes_little(tiny: Tiny, tasks: list[int]) -> None:
    """The layers behind are computed once in vain; their part of the cache does not grow."""
    model = packed_model(tiny)
    cache = learned(model)
    layers, model.model.layers = model.model.layers, model.model.layers[:2]
    for n in range(3):
        tasks.clear()
        run(model, IDS[:1, 40:41], cache)
        assert [layer.get_seq_length() for layer in cache.layers] == [41, 41, 40, 40, 40]
        for layer in cache.layers:
            layer.shrink(40)
        assert tasks == ([DEPTH] if n == 0 else [2])
    model.model.layers = layers
    run(model, IDS[:1, 40:41], cache)
    assert cache.length == 41


def test_an_early_exit(tiny: Tiny, tasks: list[int]) -> None:
    model = packed_model(tiny)
    learned(model)
    middle = early_exit(model, 3)
    plain = early_exit(unpack(copy.deepcopy(model)), 3)
    wanted = passes(plain)[0]
    learned(middle)
    tasks.clear()
    for one, other in zip(passes(middle)[0], wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    together(tasks, 3)


@pytest.mark.parametrize("how", ["rows", "columns", "others"])
@torch.no_grad()
def test_a_cache_changed_between_layers(tiny: Tiny, how: str, tasks: list[int]) -> None:
    """The third layer's keys are replaced, cut or extended by somebody while the second is called."""
    model = packed_model(tiny)
    cache = learned(model)

    def change(*_: Any) -> None:
        layer: Any = cache.layers[2]
        if how == "rows":
            layer.keep_rows(torch.tensor([0]))
        elif how == "columns":
            layer.shrink(39)
        else:
            layer.update(*torch.ones(2, 1, 2, 1, 8))

    handle = model.model.layers[1].register_forward_hook(change)
    tasks.clear()
    run(model, IDS[:1, 40:41], cache)
    handle.remove()
    assert tasks[0] == DEPTH
    assert len(tasks) > 1, "the third layer computed for itself"
    grown = {"rows": 41, "columns": 40, "others": 42}[how]
    assert [layer.get_seq_length() for layer in cache.layers] == [41, 41, grown, 41, 41]


def test_a_failed_pass(tiny: Tiny, tasks: list[int]) -> None:
    """What waited for the layers that were not reached is not given to the next pass."""
    model = packed_model(tiny)
    cache = learned(model)
    wanted = run(model, IDS[:1, 40:43], cache)

    def fail(*_: Any) -> None:
        raise KeyError("made up")

    handle = model.model.layers[2].register_forward_pre_hook(fail)
    cache.shrink(40)
    with pytest.raises(KeyError):
        run(model, IDS[:1, 40:43], cache)
    handle.remove()
    cache.shrink(40)
    assert torch.equal(run(model, IDS[:1, 40:43], cache), wanted)


def test_a_cache_emptied_for_more_rows(tiny: Tiny) -> None:
    """Its buffers are of the earlier batch."""
    model, cache = packed_model(tiny), RollbackCache()
    for rows in (1, 3):
        cache.shrink(0)
        run(model, IDS[:rows, :4], cache)
        found = run(model, IDS[:rows, 4:6], cache)
        fresh = RollbackCache()
        run(model, IDS[:rows, :4], fresh)
        assert torch.equal(found, run(model, IDS[:rows, 4:6], fresh))
        assert cache.layers[0].keys.shape[0] == rows
