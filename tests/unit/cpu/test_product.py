# SPDX-License-Identifier: Apache-2.0
"""Compiled products against float64: every type, every odd size, from several threads."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

from hf_polyspec.cpu.compiled import compiles

if not compiles():
    pytest.skip("compiled functions do not run here", allow_module_level=True)

from hf_polyspec.cpu.compiled.product import CHUNK, CompiledProduct
from hf_polyspec.cpu.compiled.tasks import part_size

FLOAT_TYPES = [torch.float32, torch.bfloat16, torch.float16]
KINDS = [*((dtype, dtype) for dtype in FLOAT_TYPES), *((torch.int8, dtype) for dtype in FLOAT_TYPES)]
SIZES = [(1, 1), (3, 5), (2, 16), (5, 17), (4, 32), (33, 40), (67, 100), (130, 15)]
"""Outputs and width: less than a tile or a register, just one, one more, many."""


def _random(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    if dtype is torch.int8:
        return torch.randint(-128, 128, shape, generator=generator).to(dtype)
    return torch.randn(shape, generator=generator).to(dtype)


def _assert_close(y: Tensor, exact: Tensor, magnitude: Tensor, width: int) -> None:
    """A float32 sum of `width` products of altogether `magnitude`, rounded once."""
    unit = torch.finfo(y.dtype)
    allowed = (width / 8 + 8) * 2.0**-24 * magnitude + unit.eps / 2 * exact.abs() + unit.smallest_normal
    assert bool(((y.double() - exact).abs() <= allowed).all())


def _check(x: Tensor, weight: Tensor, bias: Tensor | None = None, scales: Tensor | None = None) -> None:
    y = CompiledProduct(weight, bias, scales)(x)
    assert y.dtype is x.dtype
    assert y.shape == (*x.shape[:-1], weight.shape[0])
    exact, magnitude = x.double() @ weight.double().T, x.double().abs() @ weight.double().abs().T
    if scales is not None:
        exact, magnitude = exact * scales.double(), magnitude * scales.double().abs()
    if bias is not None:
        exact, magnitude = exact + bias.double(), magnitude + bias.double().abs()
    _assert_close(y, exact, magnitude, weight.shape[1])


@pytest.mark.parametrize(("stored", "active"), KINDS)
@pytest.mark.parametrize("rows", [*range(1, 14), 25, CHUNK, CHUNK + 1, 3 * CHUNK])
def test_numbers_of_rows(stored: torch.dtype, active: torch.dtype, rows: int) -> None:
    _check(_random((rows, 75), active), _random((37, 75), stored, 1))


@pytest.mark.parametrize(("stored", "active"), KINDS)
@pytest.mark.parametrize("rows", [1, 6])
def test_odd_sizes(stored: torch.dtype, active: torch.dtype, rows: int) -> None:
    for outputs, width in SIZES:
        _check(_random((rows, width), active), _random((outputs, width), stored, 1))


@pytest.mark.parametrize("active", FLOAT_TYPES)
@pytest.mark.parametrize("rows", [1, 3])
def test_scales_and_bias(active: torch.dtype, rows: int) -> None:
    x, weight = _random((rows, 40), active), _random((21, 40), torch.int8, 1)
    scales, bias = _random((21,), torch.float32, 2) / 100, _random((21,), active, 3)
    for given in ((None, None), (bias, None), (None, scales), (bias, scales)):
        _check(x, weight, *given)


@pytest.mark.parametrize("active", FLOAT_TYPES)
@pytest.mark.parametrize("rows", [1, 4, 7])
def test_zeros(active: torch.dtype, rows: int) -> None:
    x, weight = _random((rows, 50), active), _random((19, 50), torch.int8, 1)
    zeros, scales, bias = (_random((19,), torch.float32, seed) for seed in (2, 3, 4))
    zeros = (zeros * 30).round()
    y = CompiledProduct(weight, bias, scales, zeros)(x)
    exact = x.double() @ (weight.double() - zeros.double()[:, None]).T * scales.double() + bias.double()
    both = (weight.double().abs() + zeros.double().abs()[:, None]) * scales.double().abs()[:, None]
    # The sum over x is added one by one and multiplied by the zero: twice the steps of the other bounds.
    _assert_close(y, exact, 8 * (x.double().abs() @ both.T + bias.double().abs()), 50)


def test_scales_of_sixteen_bits_and_strided() -> None:
    x, weight = _random((2, 32), torch.float32), _random((6, 32), torch.int8, 1)
    scales = _random((6, 2), torch.float16, 2)[:, 0]
    _check(x, weight, None, scales)


@pytest.mark.parametrize("dtype", FLOAT_TYPES)
@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("place", [0, 31, 34])
def test_infinities_and_nan_reach_their_outputs_only(dtype: torch.dtype, rows: int, place: int) -> None:
    x, weight = torch.ones(rows, 35, dtype=dtype), torch.ones(9, 35, dtype=dtype)
    weight[2, place], weight[4, place], weight[8, place] = torch.inf, torch.nan, -torch.inf
    y = CompiledProduct(weight, None)(x)
    assert torch.equal(y.isnan().nonzero()[:, 1].unique(), torch.tensor([4]))
    assert bool((y[:, 2] == torch.inf).all())
    assert bool((y[:, 8] == -torch.inf).all())
    assert bool((y[:, [0, 1, 3, 5, 6, 7]] == 35).all())
    x[0, place] = torch.nan
    assert CompiledProduct(torch.ones(9, 35, dtype=dtype), None)(x).isnan()[0].all()


def test_sums_beyond_float16_are_infinite() -> None:
    x, weight = torch.full((1, 64), 200.0, dtype=torch.float16), torch.full((3, 64), 200.0, dtype=torch.float16)
    assert bool((CompiledProduct(weight, None)(x) == torch.inf).all())


@pytest.mark.parametrize(("stored", "active"), KINDS)
def test_inputs_and_weights_that_are_not_contiguous(stored: torch.dtype, active: torch.dtype) -> None:
    x, weight = _random((34, 5), active).T[:, ::2], _random((34, 13), stored, 1)[::2].T
    assert not x.is_contiguous()
    assert not weight.is_contiguous()
    _check(x, weight)


@pytest.mark.parametrize("shape", [(40,), (1, 40), (1, 1, 40), (2, 3, 40), (1, 16, 40)])
def test_leading_sizes_are_kept(shape: tuple[int, ...]) -> None:
    _check(_random(shape, torch.float32), _random((7, 40), torch.float32, 1))


def test_no_rows() -> None:
    assert CompiledProduct(torch.ones(7, 40), None)(torch.ones(2, 0, 40)).shape == (2, 0, 7)


@pytest.mark.parametrize("threads", [2, 3, 7])
def test_more_threads_than_outputs(threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for outputs in (1, 2, 5, 200):
            _check(_random((3, 48), torch.float32), _random((outputs, 48), torch.float32, 1))
    finally:
        torch.set_num_threads(before)


def test_parts_cover_the_outputs() -> None:
    for count in (1, 3, 4, 5, 63, 1000):
        size = part_size(count, 4)
        assert size % 4 == 0
        assert size * torch.get_num_threads() * 4 >= count


def test_calls_from_several_threads_at_once() -> None:
    weight = _random((300, 200), torch.bfloat16)
    product = CompiledProduct(weight, None)
    inputs = [_random((1 + seed % 5, 200), torch.bfloat16, seed) for seed in range(48)]
    expected = [product(x) for x in inputs]
    with ThreadPoolExecutor(6) as pool:
        for found, wanted in zip(pool.map(product, inputs * 4), expected * 4, strict=True):
            assert torch.equal(found, wanted)


@pytest.mark.parametrize(("stored", "active"), KINDS)
def test_a_row_is_the_same_whatever_stands_beside_it(stored: torch.dtype, active: torch.dtype) -> None:
    """To the last bit: so passes over one and over many tokens agree also where 16 bits round."""
    product = CompiledProduct(_random((70, 45), stored), None)
    x = _random((2 * CHUNK + 5, 45), active, 1)
    alone = torch.cat([product(row) for row in x.split(1)])
    for rows in (2, 3, 5, 7, 9, 11, 12, 13, 25, CHUNK, CHUNK + 1, 2 * CHUNK + 5):
        assert torch.equal(product(x[:rows]), alone[:rows])


def test_the_weight_lives_as_long_as_the_product() -> None:
    product = CompiledProduct(torch.full((64, 64), 2.0), torch.full((64,), 1.0))
    others = [torch.full((64, 64), 7.0) for _ in range(50)]
    assert bool((product(torch.ones(2, 64)) == 129).all())
    assert len(others) == 50


def test_tensors_of_inference_mode() -> None:
    with torch.inference_mode():
        _check(_random((2, 24), torch.float32), _random((5, 24), torch.float32, 1))


def test_two_float_types_are_refused() -> None:
    with pytest.raises(TypeError, match="cannot be multiplied"):
        CompiledProduct(torch.ones(3, 4), None)(torch.ones(1, 4, dtype=torch.bfloat16))


def test_another_width_is_refused() -> None:
    """What torch's own product refuses must not write beyond the output."""
    with pytest.raises((RuntimeError, ValueError)):
        CompiledProduct(torch.ones(3, 32), None)(torch.ones(1, 64))


def test_outputs_lie_on_the_cpu_whatever_the_default_device() -> None:
    product, x = CompiledProduct(torch.ones(3, 32), None), torch.ones(1, 32)
    with torch.device("meta"):
        device = torch.empty(0).device.type
    assert device == "meta"
    assert _on_default_device(product, x) == "cpu"


def _on_default_device(product: CompiledProduct, x: Tensor) -> str:
    """Where the output lies under another default device; nothing is computed, as memory could be written at 0."""
    from hf_polyspec.cpu.compiled import product as module

    given: list[Tensor] = []
    with pytest.MonkeyPatch.context() as patch, torch.device("meta"):
        patch.setattr(module, "run", lambda *_: None)
        given.append(product(x))
    return given[0].device.type
