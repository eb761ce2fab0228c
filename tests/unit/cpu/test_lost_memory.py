# SPDX-License-Identifier: Apache-2.0
"""Weights that lose their memory or change their shape under a packed model: torch's errors, never other memory."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_polyspec.cpu.compiled import compiles

if not compiles():
    pytest.skip("compiled functions do not run here", allow_module_level=True)

from hf_polyspec.cpu.compiled import attention, blocks, digits, groups, product, tasks, whole_block
from hf_polyspec.cpu.compiled.attention import attend
from hf_polyspec.cpu.compiled.blocks import gated, rms_norm, rotate
from hf_polyspec.cpu.compiled.dots import has_dots
from hf_polyspec.cpu.compiled.places import address, held
from hf_polyspec.cpu.compiled.product import WIDTH, CompiledProduct
from hf_polyspec.cpu.compiled.tasks import HEADER
from hf_polyspec.cpu.compiled.whole_block import SLOT
from hf_polyspec.cpu.compiled.whole_stack import StackTask
from hf_polyspec.host.cache import RollbackCache
from hf_polyspec.host.release import GENERATION_CACHE
from hf_polyspec.quantization import pack, quantize_model

Tiny = Callable[..., PreTrainedModel]
IDS = torch.randint(3, 48, (1, 14), generator=torch.Generator().manual_seed(5))
ABSURD = 1 << 44
"""Numbers that no machine has memory for."""


@torch.no_grad()
def _logits(model: Any, cache: bool) -> Tensor:
    """Of a prompt and a token after it, with the cache that whole blocks need or without one."""
    if not cache:
        return model(IDS).logits
    held = {GENERATION_CACHE: RollbackCache()}
    first = model(IDS[:, :-1], **held).logits
    return torch.cat([first, model(IDS[:, -1:], **held).logits], 1)


def _packed(tiny: Tiny, dtype: torch.dtype = torch.float32, family: str = "llama") -> tuple[Any, Any]:
    plain: Any = copy.deepcopy(tiny(family, initializer_range=0.1)).to(dtype)
    model = pack(copy.deepcopy(plain))
    for cache in (False, True, True, True):  # blocks know by then which one follows
        _logits(model, cache)
    return plain, model


PARTS = [
    *("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"),
    *("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj", "input_layernorm", "post_attention_layernorm"),
]


@pytest.mark.parametrize("cache", [True, False])
@pytest.mark.parametrize(
    "name", ["model.layers.0." + part for part in PARTS] + ["model.layers.1.mlp.up_proj", "lm_head"]
)
def test_memory_taken_away_and_given_back(tiny: Tiny, name: str, cache: bool) -> None:
    """As FSDP does between passes."""
    plain, model = _packed(tiny)
    before = _logits(model, cache)
    for one in (model,) if "norm" in name else (plain, model):  # torch reads the weights of a norm unseen
        weight = one.get_submodule(name).weight
        kept, storage = weight.detach().clone(), weight.untyped_storage()
        size = storage.nbytes()
        storage.resize_(0)
        with pytest.raises(RuntimeError):
            _logits(one, cache)
        storage.resize_(size)
        weight.data.copy_(kept)
    assert torch.equal(_logits(model, cache), before)


@pytest.mark.parametrize("cache", [True, False])
def test_all_memory_taken_away(tiny: Tiny, cache: bool) -> None:
    _, model = _packed(tiny)
    for weight in model.parameters():
        if weight.dim() == 2 and weight is not model.model.embed_tokens.weight:
            weight.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError):
        _logits(model, cache)


def test_a_bias_without_memory(tiny: Tiny) -> None:
    _, model = _packed(tiny, family="qwen2")
    model.model.layers[1].self_attn.k_proj.bias.untyped_storage().resize_(0)
    for cache in (True, False):
        with pytest.raises(RuntimeError):
            _logits(model, cache)


def _half_rows(weight: Tensor) -> Tensor:
    return weight[: weight.shape[0] // 2].clone()


def _twice_rows(weight: Tensor) -> Tensor:
    return weight.repeat(2, 1)


def _half_columns(weight: Tensor) -> Tensor:
    return weight[:, : weight.shape[1] // 2].clone()


def _transposed(weight: Tensor) -> Tensor:
    return weight.reshape(weight.shape[1], weight.shape[0]).clone()


@pytest.mark.parametrize("how", ["replaced", "data"])
@pytest.mark.parametrize("cache", [True, False])
@pytest.mark.parametrize("cut", [_half_rows, _twice_rows, _half_columns, _transposed])
@pytest.mark.parametrize("part", [part for part in PARTS if part.endswith("proj")])
def test_a_weight_of_another_shape(
    tiny: Tiny, part: str, cut: Callable[[Tensor], Tensor], cache: bool, how: str
) -> None:
    plain, model = _packed(tiny)
    results = []
    for one in (plain, model):
        layer = one.model.layers[0].get_submodule(part)
        if how == "replaced":
            layer.weight = nn.Parameter(cut(layer.weight.detach()))
        else:
            layer.weight.data = cut(layer.weight.detach())
        try:
            results.append(_logits(one, cache))
        except RuntimeError:
            results.append(None)
    wanted, found = results
    assert (wanted is None) == (found is None)
    if wanted is not None:  # a square matrix transposed
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def test_gate_and_up_that_only_fit_together(tiny: Tiny) -> None:
    """Side by side they are as many outputs as before."""
    _, model = _packed(tiny)
    mlp = model.model.layers[0].mlp
    gate, up = mlp.gate_proj.weight.detach(), mlp.up_proj.weight.detach()
    mlp.gate_proj.weight, mlp.up_proj.weight = nn.Parameter(gate[:-8].clone()), nn.Parameter(torch.cat([up, up[:8]]))
    for cache in (True, False):
        with pytest.raises(RuntimeError):
            _logits(model, cache)


def test_siblings_of_new_sizes_are_what_torch_makes_of_them() -> None:
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate_proj, self.up_proj = nn.Linear(32, 8), nn.Linear(32, 8)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.gate_proj(x), self.up_proj(x)

    pair, x = pack(Pair()), torch.randn(5, 32, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        pair(x)
        pair.up_proj.weight, pair.up_proj.bias = nn.Parameter(torch.ones(12, 32)), nn.Parameter(torch.ones(12))
        for found, layer in zip(pair(x), (pair.gate_proj, pair.up_proj), strict=True):
            torch.testing.assert_close(found, nn.functional.linear(x, layer.weight, layer.bias), rtol=1e-5, atol=1e-5)
        pair.up_proj.weight = nn.Parameter(torch.ones(12, 16))
        with pytest.raises(RuntimeError):
            pair(x)


def test_a_sibling_that_cannot_be_read_is_left_to_torch(tiny: Tiny) -> None:
    """Repeated columns: a shape, and memory for a fraction of it."""
    plain, model = _packed(tiny)
    for one in (plain, model):
        layer = one.model.layers[0].self_attn.k_proj
        layer.weight = nn.Parameter(layer.weight.detach()[:, :1].clone().expand(-1, layer.in_features))
    for cache in (True, False):
        torch.testing.assert_close(_logits(model, cache), _logits(plain, cache), rtol=1e-4, atol=1e-4)


def _lost(*shape: int) -> Tensor:
    tensor = torch.zeros(shape)
    tensor.untyped_storage().resize_(4)
    return tensor


def test_where_numbers_lie() -> None:
    whole = torch.zeros(4, 8)
    assert held(whole)
    assert held(whole[2:])
    assert held(whole, 32)
    assert not held(whole, 33)
    assert not held(whole[2:], 17)
    assert address(whole[1:], "numbers") == whole.data_ptr() + 32
    assert held(torch.zeros(0))
    assert not held(torch.zeros(2, device="meta"))
    with pytest.raises(RuntimeError, match=r"The keys \(2, 3\) on cpu have 4 bytes"):
        address(_lost(2, 3), "keys")


X, WEIGHT, JOINT, TURNS = torch.zeros(1, 3, 16), torch.ones(16), torch.zeros(1, 3, 32), torch.zeros(1, 3, 8)
QUERIES, KEYS, MASK = torch.zeros(1, 2, 3, 8), torch.zeros(1, 1, 5, 8), torch.ones(1, 1, 3, 5, dtype=torch.bool)


@pytest.mark.parametrize(
    "call",
    [
        lambda: CompiledProduct(torch.zeros(WIDTH, 16), None)(_lost(3, 16)),
        lambda: CompiledProduct(torch.zeros(WIDTH, 16), None)(torch.zeros(3, 8)),
        lambda: rms_norm(_lost(1, 3, 16), WEIGHT, 1e-5),
        lambda: rms_norm(X, _lost(16), 1e-5),
        lambda: rms_norm(X, WEIGHT[:8].clone(), 1e-5),
        lambda: rms_norm(X, WEIGHT, 1e-5, torch.zeros(1, 3, 8)),
        lambda: rms_norm(X, WEIGHT, 1e-5, _lost(1, 3, 16)),
        lambda: rotate(_lost(1, 3, 32), TURNS, TURNS, 2, 1),
        lambda: rotate(JOINT[..., :24].contiguous(), TURNS, TURNS, 2, 1),
        lambda: rotate(JOINT, _lost(1, 3, 8), TURNS, 2, 1),
        lambda: rotate(JOINT, TURNS, _lost(1, 3, 8), 2, 1),
        lambda: rotate(JOINT, TURNS, TURNS[:, :2].contiguous(), 2, 1),
        lambda: rotate(JOINT, TURNS[:, :2].contiguous(), TURNS[:, :2].contiguous(), 2, 1),
        lambda: gated(_lost(1, 3, 32)),
        lambda: gated(torch.zeros(1, 3, 31)),
        lambda: attend(_lost(1, 2, 3, 8), KEYS, KEYS, None, 1.0),
        lambda: attend(QUERIES, _lost(1, 1, 5, 8), KEYS, None, 1.0),
        lambda: attend(QUERIES, KEYS, _lost(1, 1, 5, 8), None, 1.0),
        lambda: attend(QUERIES, KEYS, KEYS.double(), None, 1.0),
        lambda: attend(QUERIES, KEYS, KEYS[:, :, :4].contiguous(), None, 1.0),
        lambda: attend(QUERIES, KEYS, KEYS, MASK[..., :4].contiguous(), 1.0),
        lambda: attend(QUERIES, KEYS, KEYS, _lost(1, 1, 3, 5), 1.0),
    ],
)
def test_steps_look_at_what_they_are_given(call: Callable[[], Any]) -> None:
    with pytest.raises(RuntimeError):
        call()


def test_steps_take_what_fits() -> None:
    """The control of the above."""
    rms_norm(X, WEIGHT, 1e-5, X)
    rotate(JOINT, TURNS, TURNS, 2, 1)
    gated(JOINT)
    held = torch.zeros(1, 1, 9, 8)[:, :, :5]  # columns of a longer buffer
    attend(QUERIES, held, held, MASK, 1.0)


def _float_product() -> None:
    tasks.run("", product._function(torch.float32, torch.float32), WIDTH, ABSURD, 1, WIDTH, 0, 0, 0, 0, 0)


def _digit_product() -> None:
    tasks.run("", digits._function(torch.float32), WIDTH, ABSURD, 1, WIDTH, 2, 0, 0, 0, 0)


def _group_product() -> None:
    tasks.run("", groups._function(torch.float32), WIDTH, ABSURD, 1, WIDTH, 0, ABSURD, *(0,) * 7)


def _norm() -> None:
    tasks.run("", blocks._function(blocks._normalizing, torch.float32, False), 1, ABSURD, *(0,) * 6)


def _attention() -> None:
    tasks.run("", attention._function(torch.float32), 1, 1, 1, 1, ABSURD, 8, ABSURD, 0, 1, 0, *(0,) * 6)


# Where the CPU has no dot products of bytes, the compiler ends the process that asks for them.
TASKS = [_float_product, _norm, _attention, *((_digit_product, _group_product) if has_dots() else ())]


@pytest.mark.parametrize("task", TASKS)
def test_no_memory_to_work_in_is_an_error(task: Callable[[], None]) -> None:
    with pytest.raises(MemoryError, match="no memory"):
        task()


@pytest.fixture
def two_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("bits", [None, 8, *((4,) if has_dots() else ())])
@pytest.mark.parametrize("together", [True, False])
def test_no_memory_in_the_middle_of_a_block_keeps_nobody_waiting(
    tiny: Tiny, bits: int | None, together: bool, two_threads: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One stage fails on all threads; they meet at the gates behind it all the same."""
    plain = copy.deepcopy(tiny("llama", hidden_size=64, intermediate_size=96, initializer_range=0.1))
    model = pack(plain if bits is None else quantize_model(plain, bits, 32))
    for _ in range(3):
        before = _logits(model, True)
    stages, run = whole_block.block_stages, StackTask.run

    def absurd(*given: Any) -> Any:
        found = list(stages(*given))
        found[6] = (found[6][0], ABSURD, *found[6][2:])  # inputs of the gates
        return found

    def absurd_together(task: StackTask, *given: Any) -> None:
        place = (0, HEADER + SLOT * 6 + 2)
        task._table[place], kept = ABSURD, task._table[place]
        try:
            run(task, *given)
        finally:
            task._table[place] = kept

    with monkeypatch.context() as patched:
        if together:
            patched.setattr(StackTask, "run", absurd_together)
        else:
            patched.setattr(whole_block, "block_stages", absurd)
        with pytest.raises(MemoryError, match="no memory"):
            _logits(model, True)
    assert torch.equal(_logits(model, True), before)
