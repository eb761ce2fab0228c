# SPDX-License-Identifier: Apache-2.0
"""Products of weights of 4 bits or fewer in groups: exact within a group, rows apart, one kernel at every size."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_polyspec.cpu.compiled import compiles

if not compiles():
    pytest.skip("compiled functions do not run here", allow_module_level=True)

import hf_polyspec
from hf_polyspec.cpu import kernels
from hf_polyspec.cpu.by_rows import ByRows
from hf_polyspec.cpu.compiled import dots
from hf_polyspec.cpu.compiled.dots import BLOCK, has_dots
from hf_polyspec.cpu.compiled.groups import CHUNK, GRAIN, WIDEST, GroupProduct
from hf_polyspec.cpu.kernels import Dequantized, build_int4_kernel
from hf_polyspec.integers.weights import QuantizedWeight, round_to_nearest
from hf_polyspec.quantization import pack, quantize_model

Tiny = Callable[..., PreTrainedModel]
pytestmark = pytest.mark.skipif(not has_dots(), reason="this CPU has no dot products of bytes")
TYPES = [torch.float32, torch.bfloat16, torch.float16]
REACH = 127 * 256 + 127


def _weight(outputs: int, width: int, group: int, bits: int = 4, seed: int = 0) -> QuantizedWeight:
    dice = torch.Generator().manual_seed(seed)
    return round_to_nearest(torch.randn(outputs, width, generator=dice), bits, group)


def _x(rows: int, width: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(9)).to(dtype)


def _bias(outputs: int) -> Tensor:
    return torch.randn(outputs, generator=torch.Generator().manual_seed(4))


def _wanted(x: Tensor, weight: QuantizedWeight, bias: Tensor) -> Tensor:
    """The product by its definition, in float64."""
    largest = x.float().abs().amax(-1, keepdim=True)
    whole = (x.float() * torch.tensor(float(REACH)).div(largest)).round().double()
    return whole @ weight.dequantize().double().T * (largest / REACH).double() + bias.double()


def _close(found: Tensor, wanted: Tensor) -> None:
    tolerance = {torch.float32: 2e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}[found.dtype]
    torch.testing.assert_close(found.double(), wanted, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 7, 8, 17, CHUNK, CHUNK + 1, 3 * CHUNK - 1])
def test_numbers_of_rows(rows: int, dtype: torch.dtype) -> None:
    weight, bias, x = _weight(2 * BLOCK + 5, 96, 32), _bias(2 * BLOCK + 5), _x(rows, 96, dtype)
    kernel = build_int4_kernel(lambda: weight, bias)
    assert isinstance(kernel, GroupProduct)
    y = kernel(x)
    assert y.dtype is dtype
    _close(y, _wanted(x, weight, bias))


@pytest.mark.parametrize("bits", [4, 3, 2])
@pytest.mark.parametrize(
    ("outputs", "width", "group"),
    [(1, 16, 16), (BLOCK, 32, -1), (BLOCK - 1, 48, 48), (40, 576, 128), (7, 80, 32), (33, 2 * WIDEST, -1)],
)
def test_shapes_and_groups(outputs: int, width: int, group: int, bits: int) -> None:
    """Ragged last groups run as smaller ones whose scales repeat, and so do those too wide for 32 bits."""
    weight, bias, x = _weight(outputs, width, group, bits), _bias(outputs), _x(5, width)
    kernel = build_int4_kernel(lambda: weight, bias)
    assert isinstance(kernel, GroupProduct)
    found, wanted = kernel(x), _wanted(x, weight, bias)
    # Sums of thousands of numbers in float32, whose size is the weights' times the root of how many there are.
    assert float((found - wanted).norm() / wanted.norm()) < 1e-6


@pytest.mark.parametrize("dtype", TYPES)
def test_a_row_gets_the_same_whoever_stands_beside_it(dtype: torch.dtype) -> None:
    weight = _weight(BLOCK + 9, 192, 64)
    kernel, x = build_int4_kernel(lambda: weight, None), _x(2 * CHUNK + 3, 192, dtype)
    whole = kernel(x)
    for start, end in [(0, 1), (5, 7), (8, 11), (0, 13), (30, 51), (3, 2 * CHUNK + 3)]:
        assert torch.equal(kernel(x[start:end]), whole[start:end])


def test_the_largest_sums_hold() -> None:
    codes = torch.full((3, WIDEST), 15, dtype=torch.uint8)
    zeros, scales = torch.zeros(3, 1, dtype=torch.uint8), torch.ones(3, 1)
    x = torch.tensor([1.0, -1.0])[:, None].expand(2, WIDEST)
    found = GroupProduct(codes, zeros, scales, None)(x)
    torch.testing.assert_close(
        found, torch.tensor([15.0 * WIDEST, -15.0 * WIDEST])[:, None].expand(2, 3), rtol=1e-6, atol=0
    )


def test_inputs_in_another_order() -> None:
    weight = _weight(20, 128, 32)
    order = torch.randperm(128, generator=torch.Generator().manual_seed(3))
    mixed = QuantizedWeight(weight.codes[:, order], weight.scales, weight.zeros, weight.g_idx[order], 4, 32)
    kernel = build_int4_kernel(lambda: mixed, None)
    assert isinstance(kernel, GroupProduct)
    for rows in (1, 40):
        x = _x(rows, 128)
        _close(kernel(x), _wanted(x, mixed, torch.zeros(20)))


def test_rows_that_are_no_numbers() -> None:
    weight = _weight(20, 64, 32)
    kernel, x = build_int4_kernel(lambda: weight, _bias(20)), _x(5, 64)
    x[1, 3], x[3, 0], x[4] = float("inf"), float("nan"), 0.0
    found = kernel(x)
    assert found[[1, 3]].isnan().all()
    assert torch.equal(found[[0, 2]], kernel(x[[0, 2]]))
    assert torch.equal(found[4], _bias(20))


def test_groups_that_no_product_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = _weight(32, 40, 8)
    with pytest.raises(ValueError, match="40 inputs are no 5 groups"):
        GroupProduct(weight.codes, weight.zeros, weight.scales, None)
    assert 8 % GRAIN
    assert isinstance(build_int4_kernel(lambda: weight, None), Dequantized)
    wide = _weight(32, 64, 32)
    monkeypatch.setattr(dots, "has_dots", lambda: False)
    assert isinstance(build_int4_kernel(lambda: wide, None), ByRows)
    monkeypatch.setattr(kernels, "compiles", lambda: False)
    assert isinstance(build_int4_kernel(lambda: wide, None), ByRows)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bits", [4, 2])
def test_a_four_bit_target_gives_plain_text(tiny: Tiny, bits: int, dtype: torch.dtype) -> None:
    """Logits to the last bit, over a prompt of more rows than any kernel calls few and checks of up to eight tokens."""
    model: Any = copy.deepcopy(tiny("llama", hidden_size=64, intermediate_size=96, initializer_range=0.15)).to(dtype)
    model = pack(quantize_model(model, bits, 32))
    ids = torch.randint(3, 48, (1, 40), generator=torch.Generator().manual_seed(bits))
    options = {"max_new_tokens": 40, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    options["attention_mask"] = torch.ones_like(ids)
    plain = hf_polyspec.generate(model, ids, **options)
    found = hf_polyspec.generate(
        model, ids, **options, assistant_models=[hf_polyspec.SuffixDrafter()], num_assistant_tokens=7
    )
    assert found.polyspec.levels[0].forward_passes < 40, "passes over several tokens"
    assert not found.polyspec.levels[0].notes
    assert torch.equal(found.sequences, plain.sequences)
    assert torch.equal(torch.cat(found.logits), torch.cat(plain.logits))
