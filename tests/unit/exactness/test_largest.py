# SPDX-License-Identifier: Apache-2.0
"""The likeliest ids are torch's own, whatever the numbers are."""

from __future__ import annotations

import pytest
import torch

from hf_polyspec.exactness.largest import largest


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("shape", [(50,), (3, 50), (2, 4, 50), (2, 0, 50)])
def test_ids(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    found = largest(values)
    assert found.dtype is torch.long
    assert torch.equal(found, values.argmax(-1))
    assert torch.equal(largest(-values[..., ::3]), (-values[..., ::3]).argmax(-1))


def test_of_equal_ones_the_first_and_what_is_no_number() -> None:
    row = torch.tensor([1.0, 5.0, 2.0, 5.0, float("-inf")])
    assert largest(row) == 1
    assert largest(torch.full((4,), float("-inf"))) == 0
    row[2] = float("nan")
    assert largest(row) == row.argmax() == 2
    assert largest(torch.ones(3, requires_grad=True)) == 0
