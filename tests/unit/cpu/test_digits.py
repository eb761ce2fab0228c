# SPDX-License-Identifier: Apache-2.0
"""Products of bytes with activations of one or two digits: whole numbers exactly, rows apart, at every size."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor

from hf_polyspec.cpu.compiled import compiles

if not compiles():
    pytest.skip("compiled functions do not run here", allow_module_level=True)

from hf_polyspec.cpu import kernels
from hf_polyspec.cpu.compiled import attention, blocks, digits, dots, numbers, product, whole_block
from hf_polyspec.cpu.compiled.digits import CHUNK, WIDEST, DigitProduct
from hf_polyspec.cpu.compiled.dots import BLOCK, GRAIN, has_dots, in_blocks
from hf_polyspec.cpu.compiled.vectors import LANES
from hf_polyspec.integers.weights import round_to_nearest

needs_dots = pytest.mark.skipif(not has_dots(), reason="this CPU has no dot products of bytes")
TYPES = [torch.float32, torch.bfloat16, torch.float16]
SIZES = [(1, 1), (3, 5), (BLOCK - 1, LANES), (BLOCK, LANES + 1), (BLOCK + 1, 4 * LANES), (5 * BLOCK + 7, 75)]
REACH = {1: 127, 2: 127 * 256 + 127}


def _matrix(outputs: int, width: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Codes, zeros, scales and bias."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 256, (outputs, width), generator=generator, dtype=torch.uint8)
    zeros = torch.randint(0, 256, (outputs,), generator=generator, dtype=torch.uint8)
    scales, bias = torch.rand(outputs, generator=generator) / 50, torch.randn(outputs, generator=generator)
    return codes, zeros, scales, bias


def _x(rows: int, width: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(9)).to(dtype)


def _wanted(x: Tensor, codes: Tensor, zeros: Tensor, scales: Tensor, bias: Tensor, each: int) -> Tensor:
    """The product by its definition, in float64."""
    largest = x.float().abs().amax(-1, keepdim=True)
    whole = (x.float() * torch.tensor(float(REACH[each])).div(largest)).round().double()
    sums = whole @ (codes.double() - zeros.double()[:, None]).T
    return sums * (largest / REACH[each]).double() * scales.double() + bias.double()


@needs_dots
@pytest.mark.parametrize("each", [1, 2])
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 7, 8, 17, CHUNK, CHUNK + 1, 3 * CHUNK - 1])
def test_numbers_of_rows(rows: int, dtype: torch.dtype, each: int) -> None:
    parts, x = _matrix(BLOCK * 2 + 5, 75), _x(rows, 75, dtype)
    y = DigitProduct(*parts, each)(x)
    assert y.dtype is dtype
    room = {"rtol": 2e-6 + torch.finfo(dtype).eps / 2, "atol": 2e-5}
    torch.testing.assert_close(y.double(), _wanted(x, *parts, each), **room)


def _bits_wanted(x: Tensor, parts: tuple[Tensor, Tensor, Tensor, Tensor], each: int) -> Tensor:
    """The product as it is rounded: exact sums of each digit, and then steps of float32 in their order."""
    codes, zeros, scales, bias = parts
    largest, reach = x.float().abs().amax(-1, keepdim=True), torch.tensor(float(REACH[each]))
    whole = (x.float() * (reach / largest)).round().long()
    high = (whole + 128) >> 8
    steps = [whole] if each == 1 else [high, whole - 256 * high]
    sums = [(digit @ (codes.long() - zeros.long()[:, None]).T).float() for digit in steps]
    total = sums[0] if each == 1 else 256 * sums[0] + sums[1]
    return (total * (scales * (largest / reach)) + bias).to(x.dtype)


@needs_dots
@pytest.mark.parametrize("each", [1, 2])
@pytest.mark.parametrize("dtype", TYPES)
def test_every_bit_is_what_the_definition_says(dtype: torch.dtype, each: int) -> None:
    """However many rows are multiplied at once: all sizes of tiles, of one, several and many of them."""
    parts = _matrix(2 * BLOCK + 3, 5 * LANES + 3)
    x = _x(CHUNK + 8, 5 * LANES + 3, dtype)
    product, wanted = DigitProduct(*parts, each), _bits_wanted(x, parts, each)
    for rows in range(1, len(x) + 1):
        assert torch.equal(product(x[:rows]), wanted[:rows])


@needs_dots
@pytest.mark.parametrize("each", [1, 2])
@pytest.mark.parametrize(("outputs", "width"), SIZES)
@pytest.mark.parametrize("rows", [1, 6])
def test_odd_sizes(outputs: int, width: int, rows: int, each: int) -> None:
    parts, x = _matrix(outputs, width), _x(rows, width)
    torch.testing.assert_close(DigitProduct(*parts, each)(x).double(), _wanted(x, *parts, each), rtol=2e-6, atol=2e-5)


@needs_dots
def test_two_digits_are_as_good_as_float() -> None:
    codes, zeros, scales, bias = _matrix(64, 576)
    x = _x(5, 576)
    exact = x.double() @ ((codes.double() - zeros.double()[:, None]) * scales.double()[:, None]).T + bias.double()
    off = [(DigitProduct(codes, zeros, scales, bias, each)(x).double() - exact).norm() for each in (1, 2)]
    assert off[1] < 1e-4 * exact.norm() < off[0]


@needs_dots
@pytest.mark.parametrize("each", [1, 2])
def test_rows_do_not_depend_on_each_other(each: int) -> None:
    """To the last bit: the law of a position must not depend on what is checked beside it."""
    product, x = DigitProduct(*_matrix(96, 130), each), _x(CHUNK * 2 + 3, 130)
    x[1] *= 1000
    together = product(x)
    assert all(torch.equal(product(row[None])[0], found) for row, found in zip(x, together, strict=True))


@needs_dots
@pytest.mark.parametrize("broken", [float("inf"), float("-inf"), float("nan")])
def test_what_is_no_number_stays_in_its_row(broken: float) -> None:
    product, x = DigitProduct(*_matrix(40, 50)), _x(3, 50)
    clean = product(x)
    x[1, 7] = broken
    y = product(x)
    assert y[1].isnan().all()
    assert torch.equal(y[::2], clean[::2])


@needs_dots
@pytest.mark.parametrize("each", [1, 2])
def test_rows_of_zeros_and_of_tiny_numbers(each: int) -> None:
    codes, zeros, scales, bias = _matrix(40, 50)
    product = DigitProduct(codes, zeros, scales, bias, each)
    for value in (0.0, 1e-42):
        torch.testing.assert_close(product(torch.full((2, 50), value)), bias.expand(2, -1))


@needs_dots
@pytest.mark.parametrize("sign", [1, -1])
def test_the_widest_sums_fit(sign: int) -> None:
    codes = torch.full((BLOCK, WIDEST), 255, dtype=torch.uint8)
    x = torch.full((1, WIDEST), float(sign))
    y = DigitProduct(codes, torch.zeros(BLOCK), torch.ones(BLOCK), None)(x)
    torch.testing.assert_close(y, torch.full((1, BLOCK), sign * 255.0 * WIDEST))


@needs_dots
def test_threads_share_a_product() -> None:
    product = DigitProduct(*_matrix(200, 100))
    parts = [_x(1 + n % 40, 100) for n in range(40)]
    wanted = [product(part) for part in parts]
    with ThreadPoolExecutor(4) as pool:
        assert all(map(torch.equal, pool.map(product, parts), wanted))


def test_blocks_hold_every_code_once() -> None:
    codes = _matrix(BLOCK + 3, 10)[0]
    found = in_blocks(codes)
    assert found.shape == (2, -(-10 // GRAIN) * (GRAIN // 4), BLOCK, 4)
    for n in (0, 1, BLOCK - 1, BLOCK, BLOCK + 2):
        assert torch.equal(found[n // BLOCK, :, n % BLOCK].flatten()[:10], codes[n])
    assert int(found.long().sum()) == int(codes.long().sum())


@pytest.mark.parametrize("bits", [None, 8])
@pytest.mark.parametrize("here", [True, False])
def test_the_kernel_of_the_machine(bits: int | None, here: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if here and not has_dots():
        pytest.skip("this CPU has no dot products of bytes")
    monkeypatch.setattr(dots, "has_dots", lambda: here)
    weight = round_to_nearest(torch.randn(48, 64, generator=torch.Generator().manual_seed(0)), 8, -1, True)
    kernel = kernels.build_int8_kernel(lambda: weight, None, bits)
    assert isinstance(kernel, DigitProduct) is here
    assert isinstance(kernel, product.CompiledProduct) is (not here and bits is None)
    x = _x(40, 64)
    torch.testing.assert_close(kernel(x), x @ weight.dequantize().T, rtol=0, atol=0.2 if bits else 2e-3)


@pytest.mark.parametrize(
    "factory",
    [
        *(attention._task, blocks._gating, blocks._normalizing, blocks._rotating),
        *(digits._task, product._task, whole_block._task),
    ],
)
def test_what_is_kept_on_disk_is_known_by_all_files(factory: Callable[..., Any]) -> None:
    """numba tells functions on disk apart by what the outermost one encloses."""
    pair = factory in (product._task, whole_block._task)
    task = factory(*[numbers.LIKE[torch.float32]] * (1 + pair))
    assert numbers.VERSION in [cell.cell_contents for cell in task.__closure__]
