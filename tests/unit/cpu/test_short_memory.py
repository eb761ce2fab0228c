# SPDX-License-Identifier: Apache-2.0
"""Packing takes the memory that there is, says what it left out, and tries again."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

import hf_polyspec
from hf_polyspec.cpu import kernels, memory, packing
from hf_polyspec.cpu.float_kernels import packing_size
from hf_polyspec.cpu.notes import notes, packing_here
from hf_polyspec.quantization import pack, quantize_model

Tiny = Callable[..., PreTrainedModel]
IDS = torch.randint(3, 48, (1, 12), generator=torch.Generator().manual_seed(5))
GIB = 1 << 30


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Says how many bytes are available from now on, of 16 GiB, beside those that stay free for others."""

    def say(size: int) -> None:
        monkeypatch.setattr(memory, "_look", memory._Look())
        seen = SimpleNamespace(total=16 * GIB, available=GIB + size)
        monkeypatch.setattr(psutil, "virtual_memory", lambda: seen)

    monkeypatch.setattr(memory, "_MEMBERSHIP", Path("/nowhere"))
    monkeypatch.setattr(memory, "_KEEPS", 0.0)
    say(8 * GIB)
    return say


@pytest.fixture
def model(tiny: Tiny) -> PreTrainedModel:
    return copy.deepcopy(tiny("llama"))


def _logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(IDS).logits
    return logits


def _products(model: nn.Module) -> list[packing.PackedProduct]:
    found = {id(layer.forward.product): layer.forward.product for layer in model.modules() if type(layer) is nn.Linear}
    return list(found.values())


def test_without_memory_the_plain_product_stays_until_there_is_some(
    model: PreTrainedModel, free: Callable[[int], None]
) -> None:
    before = _logits(model)
    pack(model)
    free(0)
    with pytest.warns(UserWarning, match=r"A matrix of \d+ x 32 of the LlamaForCausalLM is not packed.*memory") as told:
        assert _logits(model).allclose(before, atol=1e-4)
    assert len(told) == 1
    assert all(product.kept() is None and product.lacks for product in _products(model))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _logits(model)  # said once
        (note,) = notes(model)
        count = len(_products(model))
        assert note.startswith(f"{count} of {count} matrices are not packed: memory is short")
        free(GIB)
        after = _logits(model)
    assert all(product.kept() is not None and not product.lacks for product in _products(model))
    assert notes(model) == []
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4)


def test_matrices_are_packed_as_far_as_memory_goes(
    tiny: Tiny, free: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half of the memory is no more needed than all of it, and what has been granted is gone."""
    model = pack(copy.deepcopy(tiny("llama")))
    monkeypatch.setattr(memory, "_KEEPS", 1e9)
    products = _products(model)
    needs = [sum(packing_size(layer.weight, len(one.layers) > 1) for layer in one.layers) for one in products]
    free(max(needs))
    with pytest.warns(UserWarning, match="not packed"):
        _logits(model)
    packed = [product for product in products if product.kept() is not None]
    assert 0 < len(packed) < len(products)
    assert sum(product.lacks for product in products) > 0


def test_an_allocation_that_fails_is_no_error(
    model: PreTrainedModel, free: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    before, pack_float = _logits(model), packing.pack_float

    def fails(weight: Tensor, bias: Tensor | None) -> Any:
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:121] err == 0. DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(packing, "pack_float", fails)
    pack(model)
    with pytest.warns(UserWarning, match="not packed"):
        torch.testing.assert_close(_logits(model), before, rtol=1e-4, atol=1e-4)
    monkeypatch.setattr(packing, "pack_float", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        _logits(model)
    monkeypatch.setattr(packing, "pack_float", pack_float)
    _logits(model)
    assert all(product.kept() is not None for product in _products(model))


def test_a_changed_weight_without_memory_is_not_served_from_before(
    model: PreTrainedModel, free: Callable[[int], None]
) -> None:
    pack(model)
    _logits(model)
    free(0)
    with torch.no_grad():
        model.lm_head.weight.zero_()
    with pytest.warns(UserWarning, match="A matrix of 48 x 32"):
        assert _logits(model).eq(0).all()


def test_statistics_say_what_is_not_packed(
    model: PreTrainedModel, middle: PreTrainedModel, free: Callable[[int], None]
) -> None:
    """Of the target that the user packed, and of the assistants that the chain packs; warned of once each."""
    pack(model)
    free(0)
    options: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "return_dict_in_generate": True}
    assistant = copy.deepcopy(middle)
    with pytest.warns(UserWarning, match="not packed") as told:
        found = hf_polyspec.generate(model, IDS, **options, assistant_models=[assistant])
    assert len(told) == 2
    again = hf_polyspec.generate(model, IDS, **options, assistant_models=[assistant])
    for output in (found, again):
        assert [sum("not packed: memory is short" in note for note in one.notes) for one in output.polyspec.levels] == [
            1,
            1,
        ]
    free(GIB)
    output = hf_polyspec.generate(model, IDS, **options, assistant_models=[assistant])
    assert not any("not packed" in note for level in output.polyspec.levels for note in level.notes)
    assert output.sequences.tolist() == found.sequences.tolist() == again.sequences.tolist()


def test_statistics_say_where_a_token_depends_on_the_rows_beside_it(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where nothing is compiled, layers of 4 bits have two kernels."""
    monkeypatch.setattr(kernels, "compiles", lambda: False)
    model = quantize_model(tiny("llama", hidden_size=64, intermediate_size=96), 4, 32, head_bits=None)
    found = hf_polyspec.generate(
        model, IDS, max_new_tokens=8, assistant_models=[hf_polyspec.SuffixDrafter()], return_dict_in_generate=True
    )
    (note,) = found.polyspec.levels[0].notes
    assert note.startswith("14 layers of 4 bits have one kernel for few rows and another for many here")


def test_what_packing_would_need(tiny: Tiny, free: Callable[[int], None]) -> None:
    with torch.device("meta"):
        model = type(tiny("llama"))(tiny("llama").config)
    free(GIB)
    assert str(packing_here(model, torch.float32)).endswith("fits")
    free(0)
    assert "would stay unpacked" in str(packing_here(model, torch.float32))
    assert packing_here(nn.Sequential(nn.LayerNorm(4)), torch.float32) is None
    assert packing_here(model, torch.float64) is None


def _group(folder: Path, **files: object) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name.replace("_", ".", 1)).write_text(f"{content}\n")


@pytest.fixture
def groups(tmp_path: Path, free: Callable[[int], None], monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(memory, "_GROUPS", tmp_path / "cgroup")
    monkeypatch.setattr(memory, "_MEMBERSHIP", tmp_path / "member")
    return tmp_path


def test_a_container_is_smaller_than_the_machine(groups: Path) -> None:
    """The second version of control groups, an outer group smaller than the inner one."""
    (groups / "member").write_text("0::/outer/inner\n")
    _group(groups / "cgroup" / "outer" / "inner", memory_max="max", memory_current=5, memory_stat="inactive_file 1")
    _group(
        groups / "cgroup" / "outer",
        memory_max=4 * GIB,
        memory_current=3 * GIB,
        memory_stat=f"anon 7\ninactive_file {GIB}\nfile 9",
    )
    assert memory.memory() == memory.Memory(2 * GIB, 4 * GIB)
    assert memory.spare() == GIB // 4
    assert memory.grant(GIB)
    assert not memory.grant(2 * GIB)
    assert not memory.half_stays_free(GIB)


def test_a_container_of_the_first_version(groups: Path) -> None:
    """Its own path is not to be seen from inside; what is seen is its folder."""
    (groups / "member").write_text("7:cpu,cpuacct:/x\n4:memory:/pod/box\n0::/\n")
    _group(groups / "cgroup" / "memory")
    for name, content in (
        ("memory.limit_in_bytes", 2 * GIB),
        ("memory.usage_in_bytes", GIB),
        ("memory.stat", "total_inactive_file 0"),
    ):
        (groups / "cgroup" / "memory" / name).write_text(str(content))
    assert memory.memory() == memory.Memory(GIB, 2 * GIB)


@pytest.mark.parametrize("content", ["", "0::/\n", "0::/gone\n", "4:memory:/../..\n"])
def test_without_limits_the_machine_counts(groups: Path, content: str) -> None:
    (groups / "member").write_text(content)
    assert memory.memory() == memory.Memory(9 * GIB, 16 * GIB)


def test_one_look_serves_all_who_ask_at_once(free: Callable[[int], None], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_KEEPS", 1e9)
    free(100)
    assert memory.grant(60)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: 1 / 0)
    assert not memory.grant(60)
    assert memory.grant(40)
