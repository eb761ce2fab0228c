# SPDX-License-Identifier: Apache-2.0
"""Products of whole tiles, where the CPU has them: the same numbers as without, and no tile left behind."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from hf_polyspec.cpu.compiled import compiles

if not compiles():
    pytest.skip("compiled functions do not run here", allow_module_level=True)

from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from hf_polyspec.cpu.compiled.amx import has_tiles
from hf_polyspec.cpu.compiled.attention import attend
from hf_polyspec.cpu.compiled.digits import DigitProduct
from hf_polyspec.cpu.compiled.dots import has_dots
from hf_polyspec.cpu.compiled.product import CompiledProduct

COUNTS = (1, 2, 3, 8, 9, 15, 16, 17, 31, 32, 33, 34, 47, 63, 64, 65, 95, 96, 97, 98, 130, 193)
"""Numbers of rows around whole tiles, pairs of them, and what a thread holds at a time."""
SHAPES = ((1, 1), (31, 33), (32, 64), (70, 95), (96, 576))

needs_tiles = pytest.mark.skipif(not has_tiles(), reason="this CPU has no tiles, or the system lets nobody use them")
needs_dots = pytest.mark.skipif(not has_dots(), reason="this CPU has no dot products of bytes")


def _numbers(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def _codes(outputs: int, inputs: int) -> tuple[Tensor, Tensor, Tensor]:
    dice = torch.Generator().manual_seed(5)
    codes = torch.randint(0, 256, (outputs, inputs), generator=dice, dtype=torch.uint8)
    return codes, torch.randint(0, 256, (outputs,), generator=dice), torch.rand(outputs, generator=dice)


@pytest.mark.parametrize("shape", SHAPES)
def test_rows_of_bfloat16_do_not_depend_on_their_number(shape: tuple[int, int]) -> None:
    weight, x = _numbers(*shape, seed=1), _numbers(max(COUNTS), shape[1], seed=2)
    product = CompiledProduct(weight, None)
    found = product(x)
    torch.testing.assert_close(found.float(), x.float() @ weight.float().T, rtol=2**-7, atol=1e-3)
    for count in COUNTS:
        assert torch.equal(product(x[:count]), found[:count]), count
        assert torch.equal(product(x[-count:]), found[-count:]), count


@needs_dots
@pytest.mark.parametrize("digits", [1, 2])
@pytest.mark.parametrize("shape", SHAPES)
def test_rows_of_digits_are_sums_of_whole_numbers(shape: tuple[int, int], digits: int) -> None:
    """Numbers that digits hold exactly have exact sums, whichever instruction adds them."""
    codes, zeros, _ = _codes(*shape)
    dice = torch.Generator().manual_seed(3)
    reach = 127 if digits == 1 else 127 * 256 + 127
    x = torch.randint(-reach, reach + 1, (max(COUNTS), shape[1]), generator=dice).float()
    x[:, 0] = reach  # the scale is one
    product = DigitProduct(codes, zeros, torch.ones(shape[0]), None, digits)
    wanted = x.long() @ (codes.long() - zeros[:, None]).T
    found = product(x)
    torch.testing.assert_close(found, wanted.float(), rtol=2**-22, atol=2.0**9 if digits == 2 else 0.5)
    for count in COUNTS:
        assert torch.equal(product(x[:count]), found[:count]), count
        assert torch.equal(product(x[-count:]), found[-count:]), count


@intrinsic
def _stored_shapes(_typing: Any, address: Any) -> Any:
    def generate(context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        byte = ir.IntType(8).as_pointer()
        kind = ir.FunctionType(ir.VoidType(), [byte])
        store = cgutils.get_or_insert_function(builder.module, kind, "llvm.x86.sttilecfg")
        builder.call(store, [builder.inttoptr(arguments[0], byte)])
        return context.get_dummy_value()

    return types.void(types.int64), generate


@needs_tiles
def test_no_tile_is_left_behind() -> None:
    """Of a thread that keeps some the system saves eight kilobytes whenever it lets others go first."""
    state = np.zeros(64, np.uint8)
    store = njit(lambda address: _stored_shapes(address))
    codes, zeros, scales = _codes(64, 64)
    products: list[Any] = [DigitProduct(codes, zeros, scales, None, digits) for digits in (1, 2)]
    products.append(CompiledProduct(_numbers(64, 64, seed=1), None))
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for product in products:
            for count in COUNTS:
                product(_numbers(count, 64, seed=2))
                store(state.ctypes.data)
                assert not state.any(), count
        for fed in (1, 3, 17, 70):
            q, k, v = (_numbers(1, heads, fed, 64, seed=heads) for heads in (4, 2, 2))
            attend(q, k, v, None, 0.3)
            store(state.ctypes.data)
            assert not state.any()
    finally:
        torch.set_num_threads(before)


def test_torchs_own_tiles_are_not_in_the_way() -> None:
    """torch shapes the same registers for its products; each shapes them anew."""
    weight, x = _numbers(64, 64, seed=1), _numbers(40, 64, seed=2)
    product, layer = CompiledProduct(weight, None), torch.nn.Linear(64, 64, bias=False).bfloat16()
    with torch.no_grad():
        wanted, others = product(x), layer(x)
        for _ in range(3):
            assert torch.equal(product(x[:17]), wanted[:17])
            assert torch.equal(layer(x), others)
            assert torch.equal(product(x), wanted)


def test_threads_have_tiles_of_their_own() -> None:
    products = [CompiledProduct(_numbers(96, 128, seed=seed), None) for seed in range(4)]
    x = [_numbers(rows, 128, seed=rows) for rows in (5, 17, 33, 70)]
    wanted = [product(rows) for product, rows in zip(products, x, strict=True)]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(20):
            found = pool.map(lambda product, rows: product(rows), products, x)
            assert all(map(torch.equal, found, wanted))


_SUMS = """
import sys, torch
from hf_polyspec.cpu.compiled.amx import TILES
from hf_polyspec.cpu.compiled.digits import DigitProduct
from hf_polyspec.cpu.compiled.product import CompiledProduct
dice = torch.Generator().manual_seed(5)
codes = torch.randint(0, 256, (70, 95), generator=dice, dtype=torch.uint8)
weight, x = torch.randn(70, 95, generator=dice), torch.randn(40, 95, generator=dice)
found = [CompiledProduct(weight.bfloat16(), None)(x.bfloat16())]
if sys.argv[2] == "True":
    found.append(DigitProduct(codes, torch.full((70,), 128), torch.rand(70, generator=dice), None)(x))
torch.save((TILES, found), sys.argv[1])
"""


def test_a_process_that_is_to_do_without(tmp_path: Path) -> None:
    """What one process compiles with tiles and keeps on disk, another that may have none does not run."""
    found = {}
    for most in ("ALL", "AVX512_CORE_BF16", "ALL"):
        file = tmp_path / most
        environment = os.environ | {"ONEDNN_MAX_CPU_ISA": most, "NUMBA_CACHE_DIR": str(tmp_path / "kept")}
        command = [sys.executable, "-c", _SUMS, str(file), str(has_dots())]
        subprocess.run(command, env=environment, check=True, timeout=300)
        found[most] = torch.load(file)
    (tiles, sums), (none, others) = found["ALL"], found["AVX512_CORE_BF16"]
    assert (tiles, none) == (has_tiles(), False)
    torch.testing.assert_close(sums[0], others[0], rtol=2**-7, atol=1e-3)
    assert all(map(torch.equal, sums[1:], others[1:]))
