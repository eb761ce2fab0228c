# SPDX-License-Identifier: Apache-2.0
"""Scores by rows of an lm_head that are written to one after another."""

from __future__ import annotations

import pytest
import torch

from hf_polyspec.cpu.compiled import compiles
from hf_polyspec.cpu.compiled.panels import WIDTH
from hf_polyspec.cpu.row_scores import RowScores

if not compiles():
    pytest.skip("compiled functions do not run here", allow_module_level=True)

N, K = 3 * WIDTH + 5, 24


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("biased", [False, True])
def test_rows_that_are_written_later_are_scored_by(dtype: torch.dtype, biased: bool) -> None:
    generator = torch.Generator().manual_seed(0)

    def numbers(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    rows = RowScores(numbers(N, K), numbers(N) if biased else None)
    x = numbers(1, 3, K)
    for places, count in (([], N), ([0, WIDTH - 1, N - 1], N), ([2, WIDTH], WIDTH + 1), ([], 1), ([N - 2], None)):
        if places:
            rows.put(places, numbers(len(places), K), numbers(len(places)) if biased else None)
        found = rows.score(x, count)
        kept = N if count is None else count
        wanted = x.double() @ rows.weight[:kept].double().T
        wanted += 0 if rows.bias is None else rows.bias[:kept].double()
        assert found.dtype is dtype
        torch.testing.assert_close(found.double(), wanted, rtol=2 * torch.finfo(dtype).eps, atol=1e-5)
    assert rows._product is not None, "the compiled product was to be tried"


@torch.no_grad()
def test_without_memory_for_a_second_copy_torch_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hf_polyspec.cpu.row_scores.grant", lambda _: False)
    rows = RowScores(torch.randn(N, K, generator=torch.Generator().manual_seed(0)), None)
    x = torch.ones(1, 1, K)
    torch.testing.assert_close(rows.score(x), x @ rows.weight.T)
    assert rows._product is None


@torch.no_grad()
@pytest.mark.parametrize("biased", [False, True])
def test_what_another_thread_multiplies_by_stays_as_it_is(biased: bool) -> None:
    """A slice that stays is all threads': while one computes, another asks the same of it, or of fewer rows."""
    weight = torch.randn(N, K, generator=torch.Generator().manual_seed(0))
    rows, x = RowScores(weight, torch.ones(N) if biased else None), torch.ones(1, 1, K)
    rows.score(x)
    under_way = rows._product
    before = dict(vars(under_way))
    rows.score(x)
    assert rows._product is under_way, "nothing is made anew for what was asked before"
    rows.score(x, WIDTH)
    assert rows._product is not under_way
    assert all(vars(under_way)[name] is value for name, value in before.items())
