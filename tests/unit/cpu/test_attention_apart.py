# SPDX-License-Identifier: Apache-2.0
"""Attention of rows that each have a region of keys: what a row gets does not depend on the rows beside it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hf_polyspec.cpu.compiled import compiles

if not compiles():
    pytest.skip("compiled functions do not run here", allow_module_level=True)

from hf_polyspec.cpu.compiled.attention import _function, attend, attend_numbers, jobs_apart
from hf_polyspec.cpu.compiled.tasks import run

HEADS, SHARED, COLUMNS = 6, 2, 96
Span = tuple[int, int, int, int]
SHORT: Span = (0, 3, 0, 10)
"""First position in the pass, positions, first column of the region, columns that the last position sees."""


def _states(*shape: int, dtype: torch.dtype, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def _attend(queries: Tensor, keys: Tensor, values: Tensor, spans: list[Span]) -> Tensor:
    """`[F, heads, D]`, from queries `[heads, F, D]` and keys and values `[shared, COLUMNS, D]`."""
    fed, size = queries.shape[1:]
    out, jobs = queries.new_empty(fed, HEADS, size), jobs_apart(spans, HEADS // SHARED)
    places = (queries.data_ptr(), keys.data_ptr(), values.data_ptr(), out.data_ptr())
    numbers = attend_numbers((1, HEADS, SHARED, fed, COLUMNS, size), COLUMNS, None, 0.3, places, jobs)
    run("attention", _function(queries.dtype), *numbers)
    return out


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("size", [16, 64])
@pytest.mark.parametrize("other", [(3, 1, 32, 50), (3, 1, 32, 17), (3, 5, 32, 64)])
def test_a_row_is_what_it_is_alone(dtype: torch.dtype, size: int, other: Span) -> None:
    """Whatever stands in keys that some of its positions do not see, and however long the other row is."""
    queries = _states(HEADS, other[0] + other[1], size, dtype=dtype, seed=0)
    keys, values = (_states(SHARED, COLUMNS, size, dtype=dtype, seed=seed) for seed in (1, 2))
    keys[:, 9] = torch.inf  # the last that the last position of the first row sees
    keys[:, 10:32] = values[:, 10:32] = torch.nan  # nobody's
    alone = _attend(queries[:, :3].contiguous(), keys, values, [SHORT])
    assert alone[:2].isfinite().all()
    together = _attend(queries, keys, values, [SHORT, other])
    assert torch.equal(together[:2], alone[:2])
    first, count, base, columns = other
    region = slice(base, base + columns)
    for place in range(count):
        seen = columns - count + place + 1
        plain = attend(
            queries[None, :, first + place : first + place + 1].contiguous(),
            keys[None, :, region][:, :, :seen].contiguous(),
            values[None, :, region][:, :, :seen].contiguous(),
            None,
            0.3,
        )
        assert torch.equal(plain.view(HEADS, size), together[first + place])
