# SPDX-License-Identifier: Apache-2.0
"""A decoder block as one task: the same numbers as the layer's own operations, whatever the cache, mask and threads."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_polyspec.cpu.compiled import compiles
from hf_polyspec.host.cache import RollbackCache
from hf_polyspec.host.release import GENERATION_CACHE

if not compiles():
    pytest.skip("compiled functions do not run here", allow_module_level=True)

from hf_polyspec.cpu.compiled import whole_block
from hf_polyspec.cpu.compiled.dots import has_dots
from hf_polyspec.cpu.compiled.whole_stack import StackTask
from hf_polyspec.host.runner import ModelRunner
from hf_polyspec.quantization import is_packed, pack, quantize_model

Tiny = Callable[..., PreTrainedModel]
PROMPT = 45
"""Tokens of the first pass: its steps are shared out among the threads, and more than one part of attention."""
IDS = torch.randint(3, 48, (3, PROMPT + 20), generator=torch.Generator().manual_seed(5))
CLOSE = {"rtol": 1e-5, "atol": 1e-5}
CUTS = [(0, PROMPT), (PROMPT, PROMPT + 1), (PROMPT + 1, PROMPT + 4), (PROMPT + 4, PROMPT + 9)]


@pytest.fixture
def blocks(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for every block that is computed at once, by itself or together with others."""
    seen: list[int] = []
    plain, together = whole_block.whole_block, StackTask.run

    def counted(x: Tensor, *rest: Any) -> Tensor:
        seen.append(x.shape[0] * x.shape[1])
        return plain(x, *rest)

    def counted_together(self: StackTask, x: Tensor, *rest: Any) -> None:
        seen.extend(x.shape[0] * x.shape[1] for _ in self.outputs)
        together(self, x, *rest)

    monkeypatch.setattr(whole_block, "whole_block", counted)
    monkeypatch.setattr(StackTask, "run", counted_together)
    return seen


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def _pair(tiny: Tiny, family: str = "llama", **settings: Any) -> tuple[PreTrainedModel, PreTrainedModel]:
    plain = copy.deepcopy(tiny(family, initializer_range=0.1, **settings))
    return plain, pack(copy.deepcopy(plain))


@torch.no_grad()
def _passes(model: nn.Module, rows: int, mask: Tensor | None = None) -> tuple[Tensor, RollbackCache]:
    """Logits of a prompt and of three passes after it."""
    cache, found = RollbackCache(), []
    for start, end in CUTS:
        seen = None if mask is None else mask[:, :end]
        places = torch.arange(start, end)[None].expand(rows, -1)
        given = {"attention_mask": seen, "position_ids": places, GENERATION_CACHE: cache}
        found.append(model(IDS[:rows, start:end], **given).logits)
    return torch.cat(found, 1), cache


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2"])
@pytest.mark.parametrize("rows", [1, 3])
def test_the_same_numbers_and_the_same_cache(tiny: Tiny, family: str, rows: int, blocks: list[int]) -> None:
    plain, packed = _pair(tiny, family)
    wanted, kept = _passes(plain, rows)
    found, cache = _passes(packed, rows)
    torch.testing.assert_close(found, wanted, **CLOSE)
    assert blocks == [rows * (end - start) for start, end in CUTS for _ in range(2)]
    assert cache.length == kept.length == PROMPT + 9
    for one, other in zip(cache.layers, kept.layers, strict=True):
        torch.testing.assert_close(one.keys, other.keys, **CLOSE)
        torch.testing.assert_close(one.values, other.values, **CLOSE)


@torch.no_grad()
def test_a_cache_that_grows_past_its_room(tiny: Tiny, blocks: list[int]) -> None:
    plain, packed = _pair(tiny)
    ids = torch.randint(3, 48, (2, 160), generator=torch.Generator().manual_seed(6))
    caches, rooms = (RollbackCache(), RollbackCache()), set()
    for part in ids.split([10] * 16, 1):
        found = packed(part, **{GENERATION_CACHE: caches[0]}).logits
        rooms.add(caches[0].layers[0].keys.stride(1))
        torch.testing.assert_close(found, plain(part, **{GENERATION_CACHE: caches[1]}).logits, **CLOSE)
    assert len(rooms) > 1
    assert len(blocks) == 32


def test_hidden_columns_stay_hidden(tiny: Tiny, blocks: list[int]) -> None:
    plain, packed = _pair(tiny)
    mask = torch.ones(3, PROMPT + 20, dtype=torch.long)
    mask[1, :7], mask[2, 3:22] = 0, 0
    wanted, _ = _passes(plain, 3, mask)
    found, _ = _passes(packed, 3, mask)
    assert len(blocks) == 8
    torch.testing.assert_close(found, wanted, **CLOSE)
    unmasked, _ = _passes(packed, 3)
    assert (unmasked[1] - found[1]).abs().max() > 1e-2


@torch.no_grad()
def test_masks_that_are_added(tiny: Tiny, blocks: list[int]) -> None:
    """As passes over trees have them."""
    plain, packed = _pair(tiny)
    first = PROMPT
    added = torch.zeros(1, 1, 4, first + 4).masked_fill(
        torch.rand(1, 1, 4, first + 4) > 0.6, torch.finfo(torch.float32).min
    )
    added[..., :5] = 0
    found = []
    for model in (packed, plain):
        cache = RollbackCache()
        model(IDS[:1, :first], **{GENERATION_CACHE: cache})
        places = first + torch.tensor([[0, 1, 1, 2]])
        given = {"attention_mask": added, "position_ids": places, GENERATION_CACHE: cache}
        found.append(model(IDS[:1, first : first + 4], **given).logits)
    assert len(blocks) == 4
    torch.testing.assert_close(*found, **CLOSE)


@pytest.mark.parametrize("count", [1, 2, 5])
def test_any_number_of_threads(tiny: Tiny, count: int, threads: Callable[[int], None], blocks: list[int]) -> None:
    plain, packed = _pair(tiny)
    wanted, _ = _passes(plain, 1)
    threads(count)
    found, _ = _passes(packed, 1)
    assert len(blocks) == 8
    torch.testing.assert_close(found, wanted, **CLOSE)


def test_several_callers_at_once(tiny: Tiny) -> None:
    _, packed = _pair(tiny)
    wanted, _ = _passes(packed, 1)
    with ThreadPoolExecutor(4) as pool:
        for found, _ in pool.map(lambda _: _passes(packed, 1), range(24)):
            assert torch.equal(found, wanted)


@pytest.mark.parametrize("dots", [True, False])
def test_eight_bits(tiny: Tiny, blocks: list[int], dots: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """With dot products of bytes, and with weights widened in registers."""
    if not dots:
        monkeypatch.setattr("hf_polyspec.cpu.compiled.dots.has_dots", lambda: False)
    model = quantize_model(copy.deepcopy(tiny("llama", initializer_range=0.1)), 8)
    wanted, _ = _passes(model, 3)
    assert not blocks
    found, _ = _passes(pack(model), 3)
    assert len(blocks) == 8
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def test_eight_bits_of_a_packed_model(tiny: Tiny, blocks: list[int]) -> None:
    plain, packed = _pair(tiny)
    wanted, _ = _passes(quantize_model(plain, 8), 1)
    middle = quantize_model(packed, 8)
    assert not is_packed(middle)
    assert is_packed(packed)
    found, _ = _passes(pack(middle), 1)
    assert len(blocks) == 8
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits_differ_by_rounding(tiny: Tiny, dtype: torch.dtype, blocks: list[int]) -> None:
    """No further from float32 than the layer's own operations are, give or take half of that."""
    plain, _ = _pair(tiny)
    exact, _ = _passes(plain, 3)
    own, _ = _passes(plain.to(dtype), 3)
    found, _ = _passes(pack(plain), 3)
    assert blocks
    assert (found.float() - exact).norm() <= 1.5 * (own.float() - exact).norm()


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bits", [None, 8])
def test_passes_of_any_size_give_the_same_to_the_last_bit(tiny: Tiny, dtype: torch.dtype, bits: int | None) -> None:
    """So greedy text does not depend on how many tokens a pass checks, not even where 16 bits make two logits equal."""
    if bits == 8 and not has_dots():
        pytest.skip("this CPU has no dot products of bytes")
    model = copy.deepcopy(tiny("llama", initializer_range=0.1)).to(dtype)
    packed = pack(model if bits is None else quantize_model(model, bits))
    found = []
    for size in (60, 1, 3, 7, 13):
        cache = RollbackCache()
        parts = [packed(part, **{GENERATION_CACHE: cache}).logits for part in IDS[:1, :60].split(size, 1)]
        found.append(torch.cat(parts, 1))
    assert all(torch.equal(one, found[0]) for one in found)


def test_matrices_of_two_kinds_are_computed_in_steps(tiny: Tiny, blocks: list[int]) -> None:
    model = copy.deepcopy(tiny("llama", initializer_range=0.1))
    wanted, _ = _passes(model, 1)
    model.model.layers[0].mlp = quantize_model(nn.ModuleDict({"mlp": model.model.layers[0].mlp}), 8)["mlp"]
    middle, _ = _passes(model, 1)
    found, _ = _passes(pack(model), 1)
    assert len(blocks) == 4, "the second layer's"
    torch.testing.assert_close(found, middle, rtol=1e-4, atol=1e-4)
    assert not torch.equal(found, wanted)


@torch.no_grad()
def test_a_cache_in_another_dtype_is_not_written_into(tiny: Tiny, blocks: list[int]) -> None:
    _, packed = _pair(tiny)
    cache = RollbackCache()
    for layer in range(2):
        cache.update(*torch.zeros(2, 1, 2, 3, 8, dtype=torch.float64), layer)
    with pytest.raises(RuntimeError):  # as torch's own attention says
        packed(IDS[:1, :2], **{GENERATION_CACHE: cache})
    assert not blocks


def test_a_runner_rolls_back_what_was_written(tiny: Tiny) -> None:
    """Columns dropped after a pass do not come back."""
    plain, packed = _pair(tiny)
    ids = IDS[0].tolist()
    logits = []
    for model in (packed, plain):
        runner = ModelRunner(model, "the model")
        runs = [_run(runner, ids[:20], ids[20:24]), _run(runner, ids[:22], [7, 8]), _run(runner, [*ids[:22], 7], [9])]
        logits.append(torch.cat(runs, 1))
    torch.testing.assert_close(*logits, **CLOSE)


@torch.no_grad()
def _run(runner: ModelRunner, ids: list[int], draft: list[int]) -> Tensor:
    from hf_polyspec.exactness.context import Context, Prompt
    from hf_polyspec.telemetry.counters import LevelStats

    places = torch.arange(len(ids))[None]
    prompt = Prompt(len(ids), None, places)
    return runner.run(Context([ids], prompt), [draft], LevelStats("model", 0)).logits
