# SPDX-License-Identifier: Apache-2.0
"""The small steps of a block against transformers' own: the same numbers, in 16 bits to the last bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

from hf_polyspec.cpu.compiled import compiles

if not compiles():
    pytest.skip("compiled functions do not run here", allow_module_level=True)

from hf_polyspec.cpu.compiled.blocks import gated, rms_norm, rotate
from hf_polyspec.cpu.compiled.numbers import exponential

TYPES = [torch.float32, torch.bfloat16, torch.float16]
SIXTEEN = TYPES[1:]
LAST_PLACE = {torch.float32: 4 * 2.0**-23, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}
"""One unit of the last place of 16 bits; a few of float32, whose steps may be reordered."""


def _random(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def _norm(width: int, dtype: torch.dtype, epsilon: float = 1e-5) -> LlamaRMSNorm:
    norm = LlamaRMSNorm(width, eps=epsilon).to(dtype)
    norm.weight.data.copy_(_random(width, dtype=dtype, seed=9))
    return norm


def _close(found: Tensor, wanted: Tensor) -> None:
    assert found.dtype is wanted.dtype
    torch.testing.assert_close(found, wanted, rtol=LAST_PLACE[found.dtype], atol=1e-7)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("width", [1, 7, 16, 33, 500])
@torch.no_grad()
def test_norm(dtype: torch.dtype, width: int) -> None:
    norm, x = _norm(width, dtype), _random(2, 3, width, dtype=dtype)
    y, total = rms_norm(x, norm.weight, norm.variance_epsilon)
    _close(y, norm(x))
    assert total is x


@pytest.mark.parametrize("dtype", SIXTEEN)
@torch.no_grad()
def test_norm_of_a_sum_that_is_exact_in_any_order(dtype: torch.dtype) -> None:
    """Squares of small integers add up without rounding, so every bit is the same."""
    norm = _norm(64, dtype)
    integers = torch.randint(-9, 10, (2, 5, 64), generator=torch.Generator().manual_seed(1))
    x, update = integers.to(dtype), integers.flip(0).to(dtype)
    y, total = rms_norm(x, norm.weight, norm.variance_epsilon, update)
    assert torch.equal(total, x + update)
    assert torch.equal(y, norm(x + update))


@pytest.mark.parametrize("dtype", TYPES)
@torch.no_grad()
def test_norm_of_an_update(dtype: torch.dtype) -> None:
    norm, x, update = _norm(37, dtype), _random(3, 37, dtype=dtype), _random(3, 37, dtype=dtype, seed=1)
    before = x.clone()
    y, total = rms_norm(x, norm.weight, norm.variance_epsilon, update)
    assert torch.equal(total, x + update)
    assert torch.equal(x, before)
    _close(y, norm(x + update))


@torch.no_grad()
def test_norm_takes_its_epsilon() -> None:
    x = torch.full((1, 8), 1e-3)
    for epsilon in (1e-12, 1e-5, 1.0):
        norm = _norm(8, torch.float32, epsilon)
        _close(rms_norm(x, norm.weight, epsilon)[0], norm(x))
    assert not rms_norm(torch.zeros(1, 8), norm.weight, 1e-6)[0].any()


@pytest.mark.parametrize("dtype", TYPES)
@torch.no_grad()
def test_norm_of_infinities_and_nan(dtype: torch.dtype) -> None:
    norm, x = _norm(8, dtype), torch.ones(3, 8, dtype=dtype)
    x[0, 2], x[1, 3] = torch.inf, torch.nan
    found = rms_norm(x, norm.weight, norm.variance_epsilon)[0]
    torch.testing.assert_close(found, norm(x), equal_nan=True, rtol=LAST_PLACE[dtype], atol=0)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize(("heads", "shared", "size"), [(4, 2, 8), (3, 1, 6), (2, 2, 34)])
def test_rotation(dtype: torch.dtype, rows: int, heads: int, shared: int, size: int) -> None:
    joint = _random(2, 5, (heads + 2 * shared) * size, dtype=dtype)
    cos, sin = (_random(rows, 5, size, dtype=dtype, seed=seed) for seed in (1, 2))
    parts = joint.view(2, 5, heads + 2 * shared, size).transpose(1, 2)
    queries, keys, values = parts.split([heads, shared, shared], 1)
    wanted = (*apply_rotary_pos_emb(queries, keys, cos, sin), values)
    for one, other in zip(rotate(joint, cos, sin, heads, shared), wanted, strict=True):
        assert one.is_contiguous()
        if dtype is torch.float32:
            torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)
        else:
            assert torch.equal(one, other)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("width", [1, 15, 48])
def test_gate(dtype: torch.dtype, width: int) -> None:
    joint = 6 * _random(2, 3, 2 * width, dtype=dtype)
    gate, up = joint.split(width, -1)
    _close(gated(joint), F.silu(gate) * up)


@pytest.mark.parametrize("dtype", SIXTEEN)
def test_gate_to_the_last_bit(dtype: torch.dtype) -> None:
    """Every number of 16 bits between -20 and 20, rounded twice as the two operations round."""
    every = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)
    gate = every[every.abs() < 20]
    up = torch.full_like(gate, 1.3)
    found = gated(torch.cat([gate, up])[None])[0]
    # Halves between two numbers may fall either way where exponentials differ by a unit of float32.
    wanted = F.silu(gate) * up
    assert (found != wanted).float().mean() < 1e-3
    torch.testing.assert_close(found, wanted, rtol=2 * LAST_PLACE[dtype], atol=1e-7)


@pytest.mark.parametrize("dtype", TYPES)
def test_gate_at_its_ends(dtype: torch.dtype) -> None:
    values = torch.tensor([torch.inf, torch.nan, 0.0, -50.0, -500.0, -3e4, 3e4])
    gate = values.to(dtype)
    found = gated(torch.cat([gate, torch.ones_like(gate)])[None])[0]
    torch.testing.assert_close(found, F.silu(gate), equal_nan=True, rtol=LAST_PLACE[dtype], atol=1e-7)


def test_a_huge_negative_gate_is_shut() -> None:
    """silu is 0 there; an exponential that ends at e^88 leaves a number of any size."""
    gate = torch.tensor([-1e35, -1e38, -3e38])
    found = gated(torch.cat([gate, torch.ones_like(gate)])[None])[0]
    assert bool((found.abs() < 1e-20).all())


def test_exponential_over_its_range() -> None:
    points = np.linspace(-87, 88, 20001, dtype=np.float32)
    found = np.array([exponential(point) for point in points], np.float64)
    exact = np.exp(points.astype(np.float64))
    assert np.max(np.abs(found - exact) / exact) <= 2 * 2.0**-23
    assert exponential(np.float32(0)) == 1


def test_exponential_beyond_its_range() -> None:
    smallest = np.float32(2.0**-126)
    assert 0 < exponential(np.float32(-1000)) < 2 * smallest
    assert exponential(np.float32(-np.inf)) == exponential(np.float32(-87))
    assert exponential(np.float32(np.inf)) == exponential(np.float32(88)) < np.inf
