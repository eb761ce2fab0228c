# SPDX-License-Identifier: Apache-2.0
"""Blocks computed together give what they give one by one, to the last bit, and step aside when called otherwise."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_polyspec.cache import RollbackCache
from hf_polyspec.compiled import compiles

if not compiles():
    pytest.skip("compiled functions do not run here", allow_module_level=True)

from hf_polyspec.compiled import whole_block, whole_stack
from hf_polyspec.compiled.samples import Samples
from hf_polyspec.levels.early_exit import early_exit
from hf_polyspec.quantization import fused_block, is_packed, pack, quantize_model, unpack
from hf_polyspec.quantization.packing import packed_assistants

Tiny = Callable[..., PreTrainedModel]
DEPTH = 5
IDS = torch.randint(3, 48, (3, 120), generator=torch.Generator().manual_seed(5))
FORMS = ["float32", "bfloat16", "float16", "int8", "int8 bfloat16"]


@pytest.fixture
def tasks(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many blocks every task computed."""
    found: list[int] = []
    run = whole_block.run_blocks

    def counted(*given: Any) -> None:
        found.append(given[2])
        run(*given)

    monkeypatch.setattr(whole_block, "run_blocks", counted)
    monkeypatch.setattr(whole_stack, "run_blocks", counted)
    return found


@pytest.fixture
def one_by_one(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], Any]], Any]:
    """Calls something with every block in a task of its own."""

    def call(function: Callable[[], Any]) -> Any:
        with monkeypatch.context() as patched:
            patched.setattr(fused_block, "stack_output", lambda *_: None)
            return function()

    return call


def _model(tiny: Tiny, form: str = "float32", family: str = "llama", depth: int = DEPTH) -> PreTrainedModel:
    model = copy.deepcopy(tiny(family, initializer_range=0.1, num_hidden_layers=depth))
    kind, _, dtype = form.partition(" ")
    if kind == "int8":
        model = quantize_model(model, 8)
    model = pack(model.to(getattr(torch, (dtype or "float32") if kind == "int8" else kind)))
    if not _fuses(model):
        pytest.skip("this CPU multiplies such numbers itself")
    return model


def _fuses(model: PreTrainedModel) -> bool:
    """Whether blocks with this model's matrices are tasks at all."""
    from hf_polyspec.quantization.block_products import block_products

    return block_products(model.model.layers[0].forward.parts, model.dtype) is not None


@torch.no_grad()
def _run(model: nn.Module, ids: Tensor, cache: RollbackCache, **given: Any) -> Tensor:
    logits: Tensor = model(ids, past_key_values=cache, **given).logits
    return logits


@torch.no_grad()
def _passes(model: nn.Module, rows: int = 1, mask: Tensor | None = None) -> tuple[list[Tensor], RollbackCache]:
    """Passes of several lengths with a cache that grows past its room and shrinks: logits of each, and the cache."""
    cache, found = RollbackCache(), []
    for start, end in [(0, 40), (40, 41), (41, 49), (45, 46), (46, 56), (50, 51), (51, 59), (59, 67), (60, 70)]:
        cache.shrink(start)
        seen = None if mask is None else mask[:rows, :end]
        places = torch.arange(start, end)[None].expand(rows, -1)
        found.append(_run(model, IDS[:rows, start:end], cache, attention_mask=seen, position_ids=places))
    return found, cache


def _together(tasks: list[int], depth: int = DEPTH) -> None:
    """All passes but the first, whose cache does not tell yet how deep the model is, were one task."""
    assert tasks[:depth] == [1] * depth
    assert set(tasks[depth:]) == {depth}


def _same(found: tuple[list[Tensor], RollbackCache], wanted: tuple[list[Tensor], RollbackCache]) -> None:
    for one, other in zip(found[0], wanted[0], strict=True):
        assert torch.equal(one, other)
    assert found[1].length == wanted[1].length
    for held, kept in zip(found[1].layers, wanted[1].layers, strict=True):
        assert torch.equal(held.keys, kept.keys)
        assert torch.equal(held.values, kept.values)


def _learned(model: nn.Module, rows: int = 1) -> RollbackCache:
    """A cache of 40 columns, with the blocks knowing each other."""
    cache = RollbackCache()
    for end in (40, 41):
        _run(model, IDS[:rows, cache.length : end], cache)
    cache.shrink(40)
    return cache


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("rows", [1, 3])
def test_the_same_numbers_to_the_last_bit(
    tiny: Tiny, form: str, rows: int, tasks: list[int], one_by_one: Callable[..., Any]
) -> None:
    model = _model(tiny, form)
    wanted = one_by_one(lambda: _passes(model, rows))
    assert set(tasks) == {1}
    tasks.clear()
    _same(_passes(model, rows), wanted)
    _together(tasks)


@pytest.mark.parametrize("family", ["mistral", "qwen2"])
@pytest.mark.parametrize("kind", [torch.bool, torch.float32])
def test_masks(tiny: Tiny, family: str, kind: torch.dtype, tasks: list[int], one_by_one: Callable[..., Any]) -> None:
    model = _model(tiny, family=family)
    seen = torch.rand(1, 1, 4, 44, generator=torch.Generator().manual_seed(2)) < 0.6
    seen[..., 0] = True
    mask = seen if kind is torch.bool else torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(kind).min)
    given = {"attention_mask": mask, "position_ids": torch.tensor([[40, 41, 41, 42]])}
    cache = _learned(model)
    wanted = one_by_one(lambda: _run(model, IDS[:1, 40:44], cache, **given))
    cache.shrink(40)
    plain = _run(model, IDS[:1, 40:44], cache)
    cache.shrink(40)
    tasks.clear()
    assert torch.equal(_run(model, IDS[:1, 40:44], cache, **given), wanted)
    assert tasks == [DEPTH]
    assert not torch.equal(plain, wanted)


def test_padded_rows(tiny: Tiny, tasks: list[int], one_by_one: Callable[..., Any]) -> None:
    model, mask = _model(tiny), torch.ones(3, 120, dtype=torch.long)
    mask[1, :7], mask[2, 3:22] = 0, 0
    wanted = one_by_one(lambda: _passes(model, 3, mask))
    tasks.clear()
    _same(_passes(model, 3, mask), wanted)
    _together(tasks)


@pytest.mark.parametrize("count", [1, 2, 5])
def test_any_number_of_threads(tiny: Tiny, count: int, tasks: list[int]) -> None:
    model, before = _model(tiny), torch.get_num_threads()
    wanted = _passes(model)
    tasks.clear()
    try:
        torch.set_num_threads(count)
        _same(_passes(model), wanted)
    finally:
        torch.set_num_threads(before)
    _together(tasks)


def test_a_pass_is_one_task_from_the_second_on(tiny: Tiny, tasks: list[int]) -> None:
    model, cache = _model(tiny), RollbackCache()
    _run(model, IDS[:1, :40], cache)
    assert tasks == [1] * DEPTH
    for end in range(41, 50):
        tasks.clear()
        _run(model, IDS[:1, end - 1 : end], cache)
        assert tasks == [DEPTH]
    other = _learned(model)
    tasks.clear()
    _run(model, IDS[:1, 40:43], other)
    assert tasks == [DEPTH], "in another cache too"


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
    model = _model(tiny)
    wrapped = model.model.layers[2] = _Wrapped(model.model.layers[2], in_place)
    with mode():
        cache = _learned(model)
        wrapped.active = True
        wanted = one_by_one(lambda: _run(model, IDS[:1, 40:43], cache))
        keys = [layer.keys.clone() for layer in cache.layers]
        found = []
        for _ in range(3):
            cache.shrink(40)
            tasks.clear()
            found.append((_run(model, IDS[:1, 40:43], cache), list(tasks)))
            assert all(torch.equal(layer.keys, kept) for layer, kept in zip(cache.layers, keys, strict=True))
        assert all(torch.equal(logits, wanted) for logits, _ in found)
        assert [counts for _, counts in found] == [[DEPTH, 2], [3, 2], [3, 2]]


def test_a_hook_on_a_block_that_changes_its_output(
    tiny: Tiny, tasks: list[int], one_by_one: Callable[..., Any]
) -> None:
    model = _model(tiny)
    cache = _learned(model)
    plain = _run(model, IDS[:1, 40:43], cache)
    handle = model.model.layers[0].register_forward_hook(lambda _, __, output: output + 1)
    cache.shrink(40)
    wanted = one_by_one(lambda: _run(model, IDS[:1, 40:43], cache))
    for _ in range(2):
        cache.shrink(40)
        assert torch.equal(_run(model, IDS[:1, 40:43], cache), wanted)
    handle.remove()
    for _ in range(4):
        cache.shrink(40)
        tasks.clear()
        assert torch.equal(_run(model, IDS[:1, 40:43], cache), plain)
    assert tasks == [DEPTH], "believed again after a while"


@pytest.mark.parametrize("inside", ["self_attn", "mlp.act_fn", "input_layernorm", "self_attn.q_proj"])
def test_a_hook_inside_a_later_layer_is_called(tiny: Tiny, inside: str, tasks: list[int]) -> None:
    model, seen = _model(tiny), []
    cache = _learned(model)
    handle = model.model.layers[2].get_submodule(inside).register_forward_hook(lambda *_: seen.append(1))
    for _ in range(2):
        tasks.clear()
        _run(model, IDS[:1, 40:41], cache)
    assert seen == [1, 1]
    assert tasks == [2, 2], "before and behind it"
    handle.remove()
    for _ in range(3):
        tasks.clear()
        _run(model, IDS[:1, 40:41], cache)
    assert seen == [1, 1]
    assert tasks == [DEPTH]


@torch.no_grad()
def test_hidden_states_asked_for(tiny: Tiny, tasks: list[int], one_by_one: Callable[..., Any]) -> None:
    model = _model(tiny)
    cache = _learned(model)

    def states() -> Any:
        cache.shrink(40)
        return model(IDS[:1, 40:43], past_key_values=cache, output_hidden_states=True).hidden_states

    wanted = one_by_one(states)
    tasks.clear()
    found = states()
    assert tasks == [DEPTH]
    kept = [state.clone() for state in found]
    states()  # what was given before stays as it is
    assert len(found) == DEPTH + 1
    for one, held, other in zip(found, kept, wanted, strict=True):
        assert torch.equal(one, other)
        assert torch.equal(held, other)


def test_layers_that_are_left_out(tiny: Tiny, tasks: list[int]) -> None:
    """A model cut in place, with a cache of its own."""
    model = _model(tiny)
    cache = _learned(model)
    whole = _run(model, IDS[:1, 40:42], cache)
    layers, model.model.layers = model.model.layers, model.model.layers[:3]
    model.config.num_hidden_layers = 3
    short = _learned(model)
    tasks.clear()
    cut = _run(model, IDS[:1, 40:42], short)
    assert tasks == [3], "its cache tells how deep it is"
    assert not torch.equal(cut, whole)
    model.model.layers, model.config.num_hidden_layers = layers, DEPTH
    cache.shrink(40)
    assert torch.equal(_run(model, IDS[:1, 40:42], cache), whole)


@torch.no_grad()
def test_a_pass_that_ends_early_wastes_little(tiny: Tiny, tasks: list[int]) -> None:
    """The layers behind are computed once in vain; their part of the cache does not grow."""
    model = _model(tiny)
    cache = _learned(model)
    layers, model.model.layers = model.model.layers, model.model.layers[:2]
    for n in range(3):
        tasks.clear()
        _run(model, IDS[:1, 40:41], cache)
        assert [layer.get_seq_length() for layer in cache.layers] == [41, 41, 40, 40, 40]
        for layer in cache.layers:
            layer.shrink(40)
        assert tasks == ([DEPTH] if n == 0 else [2])
    model.model.layers = layers
    _run(model, IDS[:1, 40:41], cache)
    assert cache.length == 41


def test_an_early_exit(tiny: Tiny, tasks: list[int]) -> None:
    model = _model(tiny)
    _learned(model)
    middle = early_exit(model, 3)
    plain = early_exit(unpack(copy.deepcopy(model)), 3)
    wanted = _passes(plain)[0]
    _learned(middle)
    tasks.clear()
    for one, other in zip(_passes(middle)[0], wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    _together(tasks, 3)


def _double(model: Any) -> None:
    model.model.layers[3].mlp.gate_proj.weight.data.mul_(2)  # counted by nobody, and multiplied as a copy


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
    model = _model(tiny)
    cache = _learned(model)
    before = _run(model, IDS[:1, 40:43], cache)
    plain = unpack(copy.deepcopy(model))
    change(model)
    change(plain)
    cache.shrink(40)
    wanted = _run(plain, IDS[:1, 40:43], copy.deepcopy(cache))
    assert (wanted - before).abs().max() > 1e-3
    torch.testing.assert_close(_run(model, IDS[:1, 40:43], cache), wanted, rtol=1e-4, atol=1e-4)


def test_a_layer_in_training_goes_its_own_way(tiny: Tiny, tasks: list[int]) -> None:
    model = _model(tiny)
    cache = _learned(model)
    _training(model)
    tasks.clear()
    _run(model, IDS[:1, 40:43], cache)
    assert tasks == [2, 2], "those before it and those behind it do not"


@pytest.mark.parametrize("how", ["rows", "columns", "others"])
@torch.no_grad()
def test_a_cache_changed_between_layers(tiny: Tiny, how: str, tasks: list[int]) -> None:
    """The third layer's keys are replaced, cut or extended by somebody while the second is called."""
    model = _model(tiny)
    cache = _learned(model)

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
    _run(model, IDS[:1, 40:41], cache)
    handle.remove()
    assert tasks[0] == DEPTH
    assert len(tasks) > 1, "the third layer computed for itself"
    grown = {"rows": 41, "columns": 40, "others": 42}[how]
    assert [layer.get_seq_length() for layer in cache.layers] == [41, 41, grown, 41, 41]


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_stand_alone(tiny: Tiny, copied: Callable[[nn.Module], nn.Module], tasks: list[int]) -> None:
    model = _model(tiny)
    wanted = _passes(model)
    other = copied(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    _same(_passes(other), wanted)
    tasks.clear()
    _same(_passes(other), wanted)
    _together(tasks)


def test_unpacking_restores_the_layers(tiny: Tiny, tasks: list[int]) -> None:
    plain = copy.deepcopy(tiny("llama", initializer_range=0.1, num_hidden_layers=DEPTH))
    wanted, attributes = _passes(plain), [set(module.__dict__) for module in plain.modules()]
    _passes(pack(plain))
    assert DEPTH in tasks
    tasks.clear()
    _same(_passes(unpack(plain)), wanted)
    assert not tasks
    assert not is_packed(plain)
    assert [set(module.__dict__) for module in plain.modules()] == attributes


def test_assistants_are_stacked_while_they_run(tiny: Tiny, tasks: list[int]) -> None:
    model = copy.deepcopy(tiny("llama", initializer_range=0.1, num_hidden_layers=DEPTH))
    wanted = _passes(model)[0]
    for _ in range(2):
        tasks.clear()
        with packed_assistants([model]):
            for one, other in zip(_passes(model)[0], wanted, strict=True):
                torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
        assert tasks[-1] == DEPTH


def test_threads(tiny: Tiny, tasks: list[int]) -> None:
    model = _model(tiny)
    _passes(model, 3)
    wanted = [_passes(model, rows) for rows in (1, 2, 3)]
    tasks.clear()
    with ThreadPoolExecutor(4) as pool:
        for n, found in enumerate(pool.map(lambda n: _passes(model, 1 + n % 3), range(24))):
            _same(found, wanted[n % 3])
    assert set(tasks) == {1, DEPTH}
    assert tasks.count(1) == 24 * DEPTH, "the first pass of each"


def test_two_models_in_turn(tiny: Tiny, tasks: list[int]) -> None:
    one, other = _model(tiny), _model(tiny, "bfloat16", depth=3)
    wanted = _passes(one), _passes(other)
    caches = _learned(one), _learned(other)
    tasks.clear()
    for n in range(40, 44):
        _run(one, IDS[:1, n : n + 1], caches[0])
        _run(other, IDS[:1, n : n + 1], caches[1])
    assert tasks == [DEPTH, 3] * 4
    _same(_passes(one), wanted[0])
    _same(_passes(other), wanted[1])


def test_a_failed_pass(tiny: Tiny, tasks: list[int]) -> None:
    """What waited for the layers that were not reached is not given to the next pass."""
    model = _model(tiny)
    cache = _learned(model)
    wanted = _run(model, IDS[:1, 40:43], cache)

    def fail(*_: Any) -> None:
        raise KeyError("made up")

    handle = model.model.layers[2].register_forward_pre_hook(fail)
    cache.shrink(40)
    with pytest.raises(KeyError):
        _run(model, IDS[:1, 40:43], cache)
    handle.remove()
    cache.shrink(40)
    assert torch.equal(_run(model, IDS[:1, 40:43], cache), wanted)


def test_a_cache_emptied_for_more_rows(tiny: Tiny) -> None:
    """Its buffers are of the earlier batch."""
    model, cache = _model(tiny), RollbackCache()
    for rows in (1, 3):
        cache.shrink(0)
        _run(model, IDS[:rows, :4], cache)
        found = _run(model, IDS[:rows, 4:6], cache)
        fresh = RollbackCache()
        _run(model, IDS[:rows, :4], fresh)
        assert torch.equal(found, _run(model, IDS[:rows, 4:6], fresh))
        assert cache.layers[0].keys.shape[0] == rows


def test_a_profile_shows_the_steps(tiny: Tiny, tasks: list[int]) -> None:
    model = _model(tiny)
    cache = _learned(model)
    tasks.clear()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]):
        _run(model, IDS[:1, 40:41], cache)
    assert not tasks
    _run(model, IDS[:1, 41:42], cache)
    assert tasks == [DEPTH]


def test_samples() -> None:
    numbers = torch.arange(100)
    places = [(numbers.data_ptr(), 16), (numbers.data_ptr() + 400, 8), (numbers.data_ptr() + 792, 8)]
    samples = Samples(places)
    numbers[20] = -1
    assert samples.same()
    for place in (0, 1, 50, 99):
        before = int(numbers[place])
        numbers[place] = before + (1 << 60)
        assert not samples.same()
        numbers[place] = before
        assert samples.same()
    assert Samples([]).same()
