# SPDX-License-Identifier: Apache-2.0
"""A fused block computes what the layer computes, with caches, padding and trees."""

from __future__ import annotations

import copy
import pickle
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel, StaticCache

from hf_polyspec.cpu.compiled import compiles, support
from hf_polyspec.host.release import GENERATION_CACHE

if not compiles():
    pytest.skip("compiled functions do not run here", allow_module_level=True)

from hf_polyspec.cpu import fusable, packing
from hf_polyspec.cpu.fused_block import FusedBlock
from hf_polyspec.cpu.packing import packed_assistants
from hf_polyspec.quantization import is_packed, pack, quantize_model, unpack

Tiny = Callable[..., PreTrainedModel]
FAMILIES = ["llama", "mistral", "qwen2"]
IDS = torch.randint(3, 48, (1, 12), generator=torch.Generator().manual_seed(5))
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def blocks(model: nn.Module) -> list[FusedBlock]:
    """The blocks that are fused."""
    found = (module.__dict__.get("forward") for module in model.modules())
    return [forward for forward in found if isinstance(forward, FusedBlock)]


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows of every block that is computed by the compiled steps."""
    rows: list[int] = []
    compute = FusedBlock.compute

    def counted(self: FusedBlock, x: Tensor, *rest: Any) -> Tensor:
        rows.append(x.shape[0] * x.shape[1])
        return compute(self, x, *rest)

    monkeypatch.setattr(FusedBlock, "compute", counted)
    return rows


def _pair(tiny: Tiny, family: str = "llama", **settings: Any) -> tuple[PreTrainedModel, PreTrainedModel]:
    plain = tiny(family, initializer_range=0.1, **settings)
    return plain, pack(copy.deepcopy(plain))


@torch.no_grad()
def _logits(model: nn.Module, ids: Tensor = IDS, **options: Any) -> Tensor:
    logits: Tensor = model(ids, **options).logits
    return logits


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("length", [1, 2, 12])
def test_one_row(tiny: Tiny, family: str, length: int, computed: list[int]) -> None:
    plain, packed = _pair(tiny, family)
    assert len(blocks(packed)) == 2
    computed.clear()
    torch.testing.assert_close(_logits(packed, IDS[:, :length]), _logits(plain, IDS[:, :length]), **CLOSE)
    assert computed == [length, length]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("parts", [(5, 1, 1, 3), (1, 1, 4), (36, 2, 1)])
def test_with_a_cache(tiny: Tiny, family: str, parts: tuple[int, ...], computed: list[int]) -> None:
    plain, packed = _pair(tiny, family)
    ids = torch.randint(3, 48, (1, sum(parts)), generator=torch.Generator().manual_seed(1))
    computed.clear()
    caches = DynamicCache(config=plain.config), DynamicCache(config=plain.config)
    for part in ids.split(parts, 1):
        found, wanted = (
            _logits(model, part, **{GENERATION_CACHE: cache})
            for model, cache in zip((packed, plain), caches, strict=True)
        )
        torch.testing.assert_close(found, wanted, **CLOSE)
    # A cache that was seen to grow twice is written by the whole stack in one task, one with a window is not.
    tasks = [2, 2, *[2 if family == "mistral" else 1 for _ in parts[2:]]]
    assert computed == [part for part, count in zip(parts, tasks, strict=True) for _ in range(count)]


@pytest.mark.parametrize("family", FAMILIES)
def test_padded_rows(tiny: Tiny, family: str, computed: list[int]) -> None:
    plain, packed = _pair(tiny, family)
    ids = torch.randint(3, 48, (3, 6), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(ids)
    mask[1, :2], mask[2, :4] = 0, 0
    caches = DynamicCache(config=plain.config), DynamicCache(config=plain.config)
    computed.clear()
    for part, seen in ((ids[:, :5], mask[:, :5]), (ids[:, 5:], mask)):
        options = {"attention_mask": seen, "position_ids": (seen.cumsum(1) - 1).clamp(min=0)[:, -part.shape[1] :]}
        found = _logits(packed, part, **{GENERATION_CACHE: caches[0]}, **options)
        wanted = _logits(plain, part, **{GENERATION_CACHE: caches[1]}, **options)
        shown = seen[:, -part.shape[1] :].bool()
        torch.testing.assert_close(found[shown], wanted[shown], **CLOSE)
    assert computed == [15, 15, 3, 3]


def _tree(dtype: torch.dtype | None) -> Tensor:
    """Four guesses after five positions, two of them siblings: `[1, 1, 4, 9]`."""
    seen = torch.tensor([[1, 0, 0, 0], [1, 1, 0, 0], [1, 0, 1, 0], [1, 0, 1, 1]], dtype=torch.bool)
    mask = torch.cat([torch.ones(4, 5, dtype=torch.bool), seen], 1)[None, None]
    return mask if dtype is None else torch.zeros(mask.shape, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [None, torch.float32])
def test_trees(tiny: Tiny, family: str, dtype: torch.dtype | None, computed: list[int]) -> None:
    plain, packed = _pair(tiny, family)
    found = []
    computed.clear()
    for model in (plain, packed):
        cache = DynamicCache(config=plain.config)
        _logits(model, IDS[:, :5], **{GENERATION_CACHE: cache})
        options = {"attention_mask": _tree(dtype), "position_ids": torch.tensor([[5, 6, 6, 7]])}
        found.append(_logits(model, IDS[:, 5:9], **{GENERATION_CACHE: cache}, **options))
    torch.testing.assert_close(found[1], found[0], **CLOSE)
    assert computed == [5, 5, 4, 4]


def test_a_cache_of_fixed_size(tiny: Tiny) -> None:
    plain, packed = _pair(tiny)
    caches = [StaticCache(config=plain.config, max_cache_len=16) for _ in range(2)]
    for part in IDS.split([5, 3, 1, 3], 1):
        found = _logits(packed, part, **{GENERATION_CACHE: caches[0]})
        torch.testing.assert_close(found, _logits(plain, part, **{GENERATION_CACHE: caches[1]}), **CLOSE)


def test_a_window_that_slides(tiny: Tiny) -> None:
    plain, packed = _pair(tiny, "mistral", sliding_window=4)
    caches = DynamicCache(config=plain.config), DynamicCache(config=plain.config)
    for part in IDS.split([6, 1, 3, 1, 1], 1):
        found = _logits(packed, part, **{GENERATION_CACHE: caches[0]})
        torch.testing.assert_close(found, _logits(plain, part, **{GENERATION_CACHE: caches[1]}), **CLOSE)


@pytest.mark.parametrize("settings", [{"attention_bias": True, "mlp_bias": True}, {"head_dim": 12}])
def test_kinds_of_llama(tiny: Tiny, settings: dict[str, Any]) -> None:
    plain, packed = _pair(tiny, **settings)
    for name, parameter in plain.named_parameters():
        if name.endswith("bias"):
            parameter.data.normal_(generator=torch.Generator().manual_seed(3))
    packed = pack(copy.deepcopy(plain))
    assert len(blocks(packed)) == 2
    torch.testing.assert_close(_logits(packed), _logits(plain), **CLOSE)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits(tiny: Tiny, dtype: torch.dtype, computed: list[int]) -> None:
    plain = tiny("llama", initializer_range=0.1).to(dtype)
    exact = _logits(copy.deepcopy(plain).double())
    packed = pack(copy.deepcopy(plain))
    computed.clear()
    found = _logits(packed).double()
    assert len(computed) == 2
    # No further from the truth than the plain block is, give or take.
    assert (found - exact).norm() <= 1.2 * (_logits(plain).double() - exact).norm()


@pytest.mark.parametrize("bits", [4, 8])
def test_integer_weights(tiny: Tiny, bits: int, computed: list[int]) -> None:
    model = quantize_model(tiny("llama", initializer_range=0.1), bits=bits, group_size=-1 if bits == 8 else 16)
    wanted = _logits(model)
    pack(model)
    computed.clear()
    torch.testing.assert_close(_logits(model), wanted, rtol=1e-4, atol=1e-4)
    assert len(computed) == len(blocks(model)) == 2


def test_unpack_restores_the_blocks(tiny: Tiny) -> None:
    plain, packed = _pair(tiny)
    attributes = [set(module.__dict__) for module in plain.modules()]
    modes = [module.training for module in plain.modules()]
    assert is_packed(packed)
    assert len(blocks(packed)) == 2
    unpack(packed)
    assert not is_packed(packed)
    assert [set(module.__dict__) for module in packed.modules()] == attributes
    assert [module.training for module in packed.modules()] == modes
    assert torch.equal(_logits(packed), _logits(plain))


@pytest.mark.parametrize("inside", [True, False])
def test_packing_leaves_modes_as_they_are(tiny: Tiny, inside: bool) -> None:
    model = copy.deepcopy(tiny("llama")).train(not inside)
    model.model.layers[0].mlp.train(inside)
    modes = [module.training for module in model.modules()]
    pack(model)
    assert blocks(model)
    assert [module.training for module in model.modules()] == modes


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_stand_alone(tiny: Tiny, copied: Callable[[nn.Module], nn.Module], computed: list[int]) -> None:
    _, packed = _pair(tiny)
    wanted = _logits(packed)
    other = copied(packed)
    assert len(blocks(other)) == 2
    assert not {id(block.layer) for block in blocks(other)} & {id(block.layer) for block in blocks(packed)}
    inside = {id(module) for module in other.modules()}
    assert all(id(part) in inside for block in blocks(other) for _, _, part in block.parts.places)
    computed.clear()
    assert torch.equal(_logits(other), wanted)
    assert len(computed) == 2
    with torch.no_grad():
        for parameter in packed.parameters():
            parameter.zero_()
    assert torch.equal(_logits(other), wanted)


def test_a_changed_norm_is_seen(tiny: Tiny) -> None:
    plain, packed = _pair(tiny)
    for model in (plain, packed):
        model.model.layers[0].input_layernorm.weight.data.mul_(2)
        model.model.layers[1].post_attention_layernorm.weight = nn.Parameter(torch.full((32,), 0.5))
    torch.testing.assert_close(_logits(packed), _logits(plain), **CLOSE)


def test_assistants_are_fused_while_they_run(tiny: Tiny, computed: list[int]) -> None:
    plain, _ = _pair(tiny)
    model = copy.deepcopy(plain)
    with packed_assistants([model]):
        computed.clear()
        torch.testing.assert_close(_logits(model), _logits(plain), **CLOSE)
        assert len(computed) == 2
    assert not is_packed(model)
    with packed_assistants([model], model):
        assert not blocks(model)


def test_threads_share_fused_blocks(tiny: Tiny) -> None:
    _, packed = _pair(tiny)
    parts = [IDS[:, : 1 + n % 12] for n in range(48)]
    wanted = [_logits(packed, part) for part in parts]
    with ThreadPoolExecutor(4) as pool:
        for found, one in zip(pool.map(lambda part: _logits(packed, part), parts), wanted, strict=True):
            assert torch.equal(found, one)


def test_without_compiled_functions_nothing_is_fused(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (support, fusable, packing):
        monkeypatch.setattr(module, "compiles", lambda: False)
    monkeypatch.setattr("hf_polyspec.cpu.float_kernels.compiles", lambda: False)
    plain, packed = _pair(tiny)
    assert is_packed(packed)
    assert not blocks(packed)
    product = packed.model.layers[0].mlp.down_proj.forward.product
    torch.testing.assert_close(_logits(packed), _logits(plain), **CLOSE)
    assert type(product.kernel()).__name__ == "PackedFloat"


def test_a_packed_model_from_elsewhere_runs_without_compiled_functions(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pickled where they run, read where they do not."""
    plain, packed = _pair(tiny)
    for name in [name for name in sys.modules if name.startswith("hf_polyspec.cpu.compiled.")]:
        if not name.endswith("support"):
            monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setattr(support, "compiles", lambda: False)
    for module in ("packing", "float_kernels"):
        monkeypatch.setattr(f"hf_polyspec.cpu.{module}.compiles", lambda: False)
    torch.testing.assert_close(_logits(pickle.loads(pickle.dumps(packed))), _logits(plain), **CLOSE)
