# SPDX-License-Identifier: Apache-2.0
"""The end of a pass as one task: the likeliest id of each row, and how far it is ahead."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hf_polyspec.cpu.compiled import compiles

if not compiles():
    pytest.skip("compiled functions do not run here", allow_module_level=True)

from hf_polyspec.cpu.compiled.dots import has_dots
from hf_polyspec.cpu.compiled.ends import CHUNK, SLACK, EndTask
from hf_polyspec.cpu.compiled.groups import GroupProduct
from hf_polyspec.cpu.compiled.product import CompiledProduct
from hf_polyspec.cpu.compiled.vectors import LANES
from hf_polyspec.integers.weights import round_to_nearest

WIDTH, EPSILON = 32, 1e-6
FLOATS = [torch.float32, torch.bfloat16, torch.float16]
SIZES = [1, 2, LANES - 1, LANES, LANES + 1, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK + LANES + 3]


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def end_of(row: Tensor, known: int | None = None) -> tuple[int, float, bool]:
    """What is said of one row of logits, which a matrix of zeros makes of its bias alone."""
    product = CompiledProduct(torch.zeros(len(row), WIDTH, dtype=row.dtype), row)
    states = torch.ones(1, 1, WIDTH, dtype=row.dtype)
    task = EndTask(states, (torch.ones(WIDTH, dtype=row.dtype), EPSILON), product, known or len(row))
    task.run()
    assert torch.equal(task.logits[0].nan_to_num(), row.nan_to_num())
    return int(task.ids[0]), float(task.leads[0]), bool(task.close[0])


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", FLOATS)
def test_the_likeliest_and_the_second_wherever_they_stand(dtype: torch.dtype, size: int) -> None:
    row = numbers(size).to(dtype)
    ends = {0, size - 1, size // 2, min(size - 1, CHUNK - 1), min(size - 1, CHUNK)}
    for first in ends:
        for second in ends - {first}:
            logits = row.clone()
            logits[first], logits[second] = 16, 12
            assert end_of(logits) == (first, 4.0, False)
    logits = -row.abs() - 1  # none above zero
    assert end_of(logits)[0] == int(logits.float().argmax())


@pytest.mark.parametrize("size", SIZES[1:])
@pytest.mark.parametrize("dtype", FLOATS)
def test_of_equal_ones_the_first(dtype: torch.dtype, size: int) -> None:
    for first in {0, (size - 1) // 2, size - 2}:
        logits = numbers(size).to(dtype)
        logits[first:] = 9.0
        assert end_of(logits) == (first, 0.0, True)
    assert end_of(torch.tensor([-0.0, 0.0] * size, dtype=dtype))[0] == 0


@pytest.mark.parametrize("dtype", FLOATS)
def test_what_is_no_number_is_left_to_torch_where_it_is_asked_of(dtype: torch.dtype) -> None:
    size = CHUNK + LANES + 3
    for place in (0, LANES, CHUNK - 1, CHUNK, size - 1):
        for value in (float("nan"), float("inf")):
            logits = numbers(size).to(dtype)
            logits[place] = value
            assert end_of(logits)[0] == -1
    nothing = torch.full((size,), float("-inf"), dtype=dtype)
    assert end_of(nothing)[0] == -1
    nothing[CHUNK + 1] = 3
    assert end_of(nothing) == (CHUNK + 1, float("inf"), False)
    # ids beyond those that are known may be anything
    logits[-1], logits[3] = float("nan"), 20
    assert end_of(logits, size - 1)[0] == 3
    logits[3] = logits[-2] = 30
    assert end_of(logits, size - 2)[:2] == (3, float(30 - logits[: size - 2].sort().values[-2].float()))


@pytest.mark.parametrize("dtype", FLOATS)
def test_how_near_another_id_is(dtype: torch.dtype) -> None:
    step = 8 * torch.finfo(dtype).eps
    logits = numbers(CHUNK + 1).to(dtype)
    logits[CHUNK], logits[5] = 8 + step, 8
    assert end_of(logits) == (CHUNK, step, True)
    logits[CHUNK] = -8 * (1 - 4 * SLACK[dtype])
    logits[:CHUNK] = -8
    assert end_of(logits)[2] is False


def _floats(dtype: torch.dtype) -> CompiledProduct:
    return CompiledProduct(numbers(CHUNK + 5, WIDTH, seed=1).to(dtype), None)


def _bytes(dtype: torch.dtype) -> CompiledProduct:
    weight = torch.randint(-127, 127, (CHUNK + 5, WIDTH), generator=torch.Generator().manual_seed(1))
    return CompiledProduct(weight.to(torch.int8), None, torch.full((CHUNK + 5,), 0.01))


def _codes(dtype: torch.dtype) -> GroupProduct:
    held = round_to_nearest(numbers(CHUNK + 5, WIDTH, seed=1), 4, WIDTH)
    return GroupProduct(held.codes, held.zeros, held.scales, None)


KINDS = [(_floats, dtype) for dtype in FLOATS] + [(_bytes, torch.float32)]
if has_dots():
    KINDS.append((_codes, torch.bfloat16))


@pytest.mark.parametrize(("make", "dtype"), KINDS)
def test_a_norm_and_a_matrix_before(make: object, dtype: torch.dtype) -> None:
    product = make(dtype)  # type: ignore[operator]
    states, weight = numbers(1, 5, WIDTH).to(dtype), (1 + 0.1 * numbers(WIDTH, seed=2)).to(dtype)
    known = CHUNK + 3
    task = EndTask(states, (weight, EPSILON), product, known)
    for turn in range(2):  # what is kept is for the next pass
        states.copy_(numbers(1, 5, WIDTH, seed=7 + turn).to(dtype))
        task.run()
        wide = states[0].float()
        normed = weight * (wide * (wide.square().mean(-1, keepdim=True) + EPSILON).rsqrt()).to(dtype)
        wanted, eps = product(normed).float(), torch.finfo(dtype).eps
        torch.testing.assert_close(task.logits.float(), wanted, rtol=4 * eps, atol=40 * eps)
        said = task.logits[:, :known].float()
        assert task.ids.tolist() == said.argmax(-1).tolist()
        best, second = said.topk(2).values.unbind(-1)
        assert task.leads.tolist() == (best - second).tolist()
