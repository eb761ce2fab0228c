# SPDX-License-Identifier: Apache-2.0
"""Attention over a cache against torch's in float64."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from hf_polyspec.cpu.compiled import compiles

if not compiles():
    pytest.skip("compiled functions do not run here", allow_module_level=True)

from hf_polyspec.cpu.compiled.attention import attend, plain_mask, readable

TYPES = [torch.float32, torch.bfloat16, torch.float16]
SIZES = [16, 64]
"""Of heads: bfloat16 of the second is multiplied in tiles where the CPU has them."""
ALLOWED = {torch.float32: 4e-6, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
"""Half a unit of the last place for the one rounding of a result, besides float32 sums."""


def _random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def _given(
    batch: int, heads: int, shared: int, fed: int, seen: int, size: int, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor]:
    shapes = (batch, heads, fed, size), (batch, shared, seen, size), (batch, shared, seen, size)
    first, second, third = (_random(*shape, dtype=dtype, seed=seed) for seed, shape in enumerate(shapes))
    return first, second, third


def _exact(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, causal: bool = False) -> Tensor:
    if mask is not None and mask.dtype is not torch.bool:
        mask = mask.double()
    found = F.scaled_dot_product_attention(
        q.double(), k.double(), v.double(), mask, is_causal=causal, scale=scale, enable_gqa=True
    )
    return found.transpose(1, 2).flatten(2)


def _check(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, causal: bool = False) -> None:
    scale = 0.3
    assert readable(k)
    assert readable(v)
    found = attend(q, k, v, mask, scale)
    assert found.dtype is q.dtype
    room = ALLOWED[q.dtype]
    torch.testing.assert_close(found.double(), _exact(q, k, v, mask, scale, causal), rtol=room, atol=4e-6)


def _bool_mask(rows: int, fed: int, seen: int) -> Tensor:
    mask = torch.rand(rows, 1, fed, seen, generator=torch.Generator().manual_seed(7)) < 0.5
    mask[..., 0] = True
    return mask


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("seen", [1, 2, 4, 15, 33, 70, 257, 300, 513])
@pytest.mark.parametrize("size", SIZES)
def test_one_position_sees_everything(dtype: torch.dtype, seen: int, size: int) -> None:
    _check(*_given(2, 4, 2, 1, seen, size, dtype))


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("fed", [2, 4, 5, 16, 17, 33, 75, 290])
@pytest.mark.parametrize("size", SIZES)
def test_positions_without_a_mask_see_what_came_before(dtype: torch.dtype, fed: int, size: int) -> None:
    _check(*_given(2, 4, 2, fed, fed, size, dtype), causal=True)


def test_without_a_mask_before_a_longer_cache_the_corner_is_the_upper_left() -> None:
    """As in transformers, where only caches of a fixed size come without a mask and longer than what is fed."""
    q, k, v = _given(1, 2, 2, 3, 9, 16)
    found = attend(q, k, v, None, 0.3)
    exact = _exact(q, k[:, :, :3], v[:, :, :3], None, 0.3, causal=True)
    torch.testing.assert_close(found.double(), exact, rtol=4e-6, atol=4e-6)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("size", [1, 4, 6, 8, 16, 20, 32, 64, 80, 96, 128])
def test_sizes_of_heads(dtype: torch.dtype, size: int) -> None:
    _check(*_given(1, 2, 1, 3, 13, size, dtype), _bool_mask(1, 3, 13))


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("fed", [1, 2, 7])
@pytest.mark.parametrize("seen", [7, 20])
def test_masks_of_bools(rows: int, fed: int, seen: int) -> None:
    _check(*_given(3, 4, 2, fed, seen, 32), _bool_mask(rows, fed, seen))


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("hidden", [-torch.inf, None])
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("size", SIZES)
def test_masks_that_are_added(dtype: torch.dtype, hidden: float | None, rows: int, size: int) -> None:
    least = torch.finfo(dtype).min if hidden is None else hidden
    mask = torch.zeros(rows, 1, 5, 11, dtype=dtype).masked_fill(~_bool_mask(rows, 5, 11), least)
    mask += _random(rows, 1, 5, 11, dtype=dtype, seed=8).abs().neg()
    _check(*_given(3, 4, 2, 5, 11, size, dtype), mask)


def test_a_mask_of_another_float_type_and_one_that_is_not_contiguous() -> None:
    given = _given(2, 2, 2, 3, 8, 16)
    mask = torch.zeros(1, 1, 3, 8).masked_fill(~_bool_mask(1, 3, 8), -torch.inf)
    _check(*given, mask.double())
    _check(*given, _bool_mask(1, 3, 8).expand(2, 1, 3, 8))
    _check(*given, _bool_mask(2, 3, 16)[..., ::2])


@pytest.mark.parametrize("added", [False, True])
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("size", SIZES)
def test_rows_that_see_nothing_are_zero(added: bool, dtype: torch.dtype, size: int) -> None:
    mask = _bool_mask(2, 4, 9)
    mask[1, 0, 2] = mask[0, 0, 0] = False
    given = torch.zeros(mask.shape).masked_fill(~mask, -torch.inf) if added else mask
    q, k, v = _given(2, 4, 2, 4, 9, size, dtype)
    found = attend(q, k, v, given, 0.3)
    assert not found[1, 2].any()
    assert not found[0, 0].any()
    seen = torch.ones(2, 4, dtype=torch.bool)
    seen[1, 2] = seen[0, 0] = False
    wanted = _exact(q, k, v, mask, 0.3)[seen]
    torch.testing.assert_close(found.double()[seen], wanted, rtol=ALLOWED[dtype], atol=4e-6)


def test_rows_hidden_by_the_least_number_see_everything_alike() -> None:
    q, k, v = _given(1, 1, 1, 2, 6, 16)
    mask = torch.full((1, 1, 2, 6), torch.finfo(torch.float32).min)
    torch.testing.assert_close(attend(q, k, v, mask, 0.3)[0, 0], v[0, 0].mean(0))


@pytest.mark.parametrize(("heads", "shared"), [(1, 1), (4, 4), (6, 2), (6, 1), (15, 5)])
def test_heads_that_share_keys(heads: int, shared: int) -> None:
    _check(*_given(2, heads, shared, 3, 10, 16), _bool_mask(2, 3, 10))


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("size", [16, 12, 64])
def test_a_view_of_a_larger_buffer(dtype: torch.dtype, size: int) -> None:
    q, k, v = _given(2, 4, 2, 3, 40, size, dtype)
    _check(q, k[:, :, :11], v[:, :, :11], _bool_mask(2, 3, 11))
    k[:, :, 11:] = torch.nan
    v[:, :, 11:] = torch.nan
    _check(q, k[:, :, :11], v[:, :, :11], _bool_mask(2, 3, 11))
    _check(q, k[:, :, 2:9].clone(), v[:, :, 2:9].clone(), _bool_mask(2, 3, 7))
    _check(q, k[:, :, :1], v[:, :, :1], _bool_mask(2, 3, 1))


def test_what_is_readable() -> None:
    states = torch.zeros(2, 3, 10, 16)
    assert readable(states)
    assert readable(states[:, :, :4])
    assert readable(states[:, :, 4:])
    assert not readable(states.transpose(1, 2))
    assert not readable(states.transpose(2, 3))
    assert not readable(states[:, :2])
    assert not readable(states[..., :8])
    assert not readable(states[:, :, ::2])
    assert not readable(torch.zeros(1, 1, 1, 16).expand(2, 3, 10, 16))


def test_states_repeated_without_memory_of_their_own_are_not_readable() -> None:
    """One head for all rows and heads: no distance between heads, so no room for what is seen."""
    assert not readable(torch.zeros(1, 1, 10, 16).expand(2, 3, 10, 16))


def test_large_scores_do_not_overflow() -> None:
    q, k, v = _given(1, 2, 2, 2, 8, 16)
    _check(q * 100, k * 100, v, _bool_mask(1, 2, 8))


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("size", SIZES)
def test_keys_that_are_no_numbers_are_not_passed_over(dtype: torch.dtype, size: int) -> None:
    q, k, v = _given(1, 1, 1, 1, 8, size, dtype)
    k[0, 0, 3, 2] = torch.nan
    assert attend(q, k, v, None, 0.3).isnan().all()


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("size", SIZES)
def test_values_that_are_no_numbers_are_not_passed_over(dtype: torch.dtype, size: int) -> None:
    q, k, v = _given(1, 1, 1, 1, 8, size, dtype)
    v[0, 0, 3, 2] = torch.nan
    found = attend(q, k, v, None, 0.3)
    assert found[0, 0, 2].isnan()
    assert found.isnan().sum() == 1


@pytest.mark.parametrize("threads", [2, 5])
def test_more_threads_than_heads(threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        _check(*_given(1, 1, 1, 3, 10, 16), _bool_mask(1, 3, 10))
        _check(*_given(3, 4, 2, 3, 10, 16), _bool_mask(3, 3, 10))
    finally:
        torch.set_num_threads(before)


def test_calls_from_several_threads_at_once() -> None:
    q, k, v = _given(2, 8, 4, 4, 50, 32)
    mask = _bool_mask(2, 4, 50)
    wanted = attend(q, k, v, mask, 0.3)
    with ThreadPoolExecutor(6) as pool:
        for found in pool.map(lambda _: attend(q, k, v, mask, 0.3), range(60)):
            assert torch.equal(found, wanted)


def test_a_converted_mask_is_kept_until_it_changes() -> None:
    """All layers of a pass are given the same one; another one, or one written into, is converted anew."""
    mask = torch.zeros(1, 1, 2, 5, dtype=torch.bfloat16)
    first = plain_mask(mask)
    assert first.dtype is torch.float32
    assert plain_mask(mask) is first
    mask[..., 3] = float("-inf")
    assert torch.equal(plain_mask(mask), mask.float())
    other = torch.ones_like(mask)
    assert torch.equal(plain_mask(other), other.float())
    plain = torch.zeros(1, 1, 2, 5)
    assert plain_mask(plain) is plain


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("size", [16, 80, 20, 64, 96])
def test_a_position_is_the_same_whatever_is_fed_with_it(dtype: torch.dtype, size: int) -> None:
    """To the last bit, with and without a mask that hides what comes after."""
    q, k, v = _given(1, 2, 1, 270, 270, size, dtype)
    whole = attend(q, k, v, None, 0.3)
    mask = torch.ones(270, 270, dtype=torch.bool).tril()[None, None]
    assert torch.equal(attend(q, k, v, mask, 0.3), whole)
    for position in (0, 1, 2, 3, 4, 30, 31, 32, 63, 64, 69, 254, 255, 256, 257, 269):
        end = position + 1
        alone = attend(q[:, :, position:end].contiguous(), k[:, :, :end], v[:, :, :end], None, 0.3)
        assert torch.equal(alone[:, 0], whole[:, position])
        given = mask[:, :, position - 1 : end, :end]
        if position:
            pair = attend(q[:, :, position - 1 : end].contiguous(), k[:, :, :end], v[:, :, :end], given, 0.3)
            assert torch.equal(pair, whole[:, position - 1 : end])
