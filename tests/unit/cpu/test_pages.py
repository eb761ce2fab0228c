"""Matrices in large pages."""

from __future__ import annotations

import gc
import mmap
import os
import warnings
from weakref import ref

import pytest
import torch

from hf_polyspec.cpu.compiled import pages
from hf_polyspec.cpu.compiled.pages import WORTH, laid_out
from hf_polyspec.cpu.compiled.panels import LINE

pytestmark = pytest.mark.skipif(not hasattr(mmap, "MADV_HUGEPAGE"), reason="this system has no such pages")


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16, torch.float32])
def test_the_same_numbers_one_matrix_behind_the_other(dtype: torch.dtype) -> None:
    matrices = [torch.randint(0, 100, (count, 331)).to(dtype) for count in (512, 401, 700)]
    found = [laid_out(matrix) for matrix in matrices]
    assert all(torch.equal(one, other) and one.dtype is dtype for one, other in zip(found, matrices, strict=True))
    assert all(one.data_ptr() % LINE == 0 and one.is_contiguous() for one in found)
    ends = [one.data_ptr() + one.nbytes for one in found]
    starts = [one.data_ptr() for one in found]
    assert all(0 <= start - end < LINE for start, end in zip(starts[1:], ends, strict=False))


def test_what_does_not_lie_in_a_row_does_afterwards() -> None:
    matrix = torch.randn(300, 400).t()
    assert torch.equal(laid_out(matrix), matrix)
    assert laid_out(matrix).is_contiguous()


def test_small_ones_stay_where_they_are() -> None:
    matrix = torch.zeros(WORTH - 1, dtype=torch.uint8)
    assert laid_out(matrix) is matrix


def test_memory_is_given_back_once_nothing_lies_in_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pages, "_chunk", lambda: None)
    one, other = (laid_out(torch.ones(WORTH, dtype=torch.uint8)) for _ in range(2))
    chunk = ref(pages._chunk())
    del one
    gc.collect()
    assert chunk() is not None
    assert bool((other == 1).all())
    del other
    gc.collect()
    assert chunk() is None
    again = laid_out(torch.ones(WORTH, dtype=torch.uint8))
    assert bool((again == 1).all())


def test_without_memory_of_that_kind_it_stays_where_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **_given: object) -> None:
        raise OSError("no memory")

    monkeypatch.setattr(pages, "_chunk", lambda: None)
    monkeypatch.setattr(pages.mmap, "mmap", refuse)
    matrix = torch.ones(WORTH, dtype=torch.uint8)
    assert laid_out(matrix) is matrix


def test_a_forked_process_writes_to_memory_of_its_own() -> None:
    size = 2 * WORTH
    before = laid_out(torch.full((size,), 1, dtype=torch.uint8))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forks beside threads: the child computes nothing
        child = os.fork()
    if not child:
        try:
            chunk, start = pages._place(size)
            chunk[: start + size] = bytes([3]) * (start + size)
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    after = laid_out(torch.full((size,), 4, dtype=torch.uint8))
    assert bool((before == 1).all())
    assert bool((after == 4).all())
