# SPDX-License-Identifier: Apache-2.0
"""Many rows of bfloat16 are multiplied by torch where the CPU multiplies tiles of them, few by compiled products."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_polyspec.cpu.compiled import ROWS, compiles, left_to_torch, support
from hf_polyspec.host.cache import RollbackCache

if not compiles():
    pytest.skip("compiled functions do not run here", allow_module_level=True)

from stacked_blocks import DEPTH, learned, packed_model, run

from hf_polyspec.cpu.float_kernels import PackedFloat, pack_float, pack_for_many_rows

Tiny = Callable[..., PreTrainedModel]
IDS = torch.randint(3, 48, (2, ROWS), generator=torch.Generator().manual_seed(6))


@pytest.fixture(params=[True, False])
def multiplies(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    monkeypatch.setattr(support, "multiplies_tiles", lambda: request.param)
    found: bool = request.param
    return found


@pytest.fixture
def plainly(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The rows of every product that torch computes."""
    found: list[int] = []
    plain = torch.nn.functional.linear

    def counted(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        found.append(x.numel() // x.shape[-1])
        return plain(x, weight, bias)

    monkeypatch.setattr(torch.nn.functional, "linear", counted)
    return found


def test_which_rows(multiplies: bool) -> None:
    assert not left_to_torch(ROWS, torch.bfloat16)
    assert left_to_torch(ROWS + 1, torch.bfloat16) is multiplies
    assert not left_to_torch(ROWS + 1, torch.float16)
    assert not left_to_torch(ROWS + 1, torch.float32)


@pytest.mark.parametrize("shape", [(1, ROWS), (2, ROWS // 2), (2, ROWS // 2 + 1), (1, ROWS + 1)])
def test_passes_of_a_packed_model(tiny: Tiny, multiplies: bool, plainly: list[int], shape: tuple[int, int]) -> None:
    own = copy.deepcopy(tiny("llama", initializer_range=0.1, num_hidden_layers=DEPTH)).to(torch.bfloat16)
    ids = IDS.flatten()[: shape[0] * shape[1]].view(shape)
    packed = packed_model(tiny, "bfloat16")
    learned(packed, shape[0])  # blocks that would be computed together
    plainly.clear()
    found = run(packed, ids, RollbackCache())
    many = multiplies and shape[0] * shape[1] > ROWS
    assert plainly == [shape[0] * shape[1]] * ((7 * DEPTH + 1) if many else 0)
    with torch.no_grad():
        torch.testing.assert_close(found, own(ids).logits, rtol=0.05, atol=0.03)


def test_few_rows_are_one_task_again_after_many(
    tiny: Tiny, multiplies: bool, plainly: list[int], tasks: list[int]
) -> None:
    packed = packed_model(tiny, "bfloat16")
    cache = learned(packed)
    plainly.clear()
    tasks.clear()
    run(packed, IDS.view(1, -1)[:, : ROWS + 1], cache)
    assert (tasks == []) is (len(plainly) > 0) is multiplies
    plainly.clear()
    run(packed, IDS[:1, :3], cache)
    assert tasks[-1] == DEPTH
    assert plainly == []


def test_layers_of_integers_are_one_task_with_any_number_of_rows(
    tiny: Tiny, multiplies: bool, plainly: list[int], tasks: list[int]
) -> None:
    packed = packed_model(tiny, "int8 bfloat16")
    cache = learned(packed)
    plainly.clear()
    tasks.clear()
    run(packed, IDS.view(1, -1)[:, : ROWS + 1], cache)
    assert tasks == [DEPTH]
    assert plainly == []


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_kernels_for_many_rows(multiplies: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    from hf_polyspec.cpu import float_kernels

    if multiplies and dtype is torch.bfloat16 and not torch.cpu._is_avx512_supported():
        pytest.skip("torch packs no bfloat16 on this CPU")
    dice = torch.Generator().manual_seed(2)
    weight, x = torch.randn(40, 24, generator=dice).to(dtype), torch.randn(ROWS + 3, 24, generator=dice).to(dtype)
    monkeypatch.setattr(float_kernels, "multiplies", lambda _: True)
    kernel: Any = pack_for_many_rows(weight, None)
    assert isinstance(kernel, PackedFloat) is (multiplies and dtype is torch.bfloat16)
    assert not isinstance(pack_float(weight, None), PackedFloat)
    torch.testing.assert_close(kernel(x), torch.nn.functional.linear(x, weight))
