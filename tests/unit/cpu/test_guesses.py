# SPDX-License-Identifier: Apache-2.0
"""Scores with some raised and the likeliest found, in one task, are those of torch's own operations."""

from __future__ import annotations

import math

import pytest
import torch

from hf_polyspec.cpu.compiled import compiles

if not compiles():
    pytest.skip("compiled functions do not run here", allow_module_level=True)

from hf_polyspec.cpu.compiled.guesses import guesses


def wanted(pieces: list[torch.Tensor], raised: tuple[list[int], list[int], list[float]]) -> torch.Tensor:
    """The mixture's scores, one raised after the other."""
    scores = torch.cat([piece.double() for piece in pieces], dim=-1)
    flat, whole = scores.flatten(0, 1), scores.flatten(0, 1).logsumexp(-1)
    for node, column, share in zip(*raised, strict=True):
        flat[node, column] = torch.logaddexp(flat[node, column], whole[node] + math.log(share))
    return scores


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("nodes", [1, 7])
@pytest.mark.parametrize("joined", [0, 13])
def test_numbers(dtype: torch.dtype, nodes: int, joined: int) -> None:
    generator = torch.Generator().manual_seed(nodes + joined)
    pieces = [torch.randn(2, nodes, n, generator=generator).mul(3).to(dtype) for n in (61, joined) if n]
    raised = [0, 0, 2 * nodes - 1], [60, 3, 17], [0.5, 4.0, 1e-6]
    for given in (raised, ([], [], [])):
        scores = wanted(pieces, given)
        for count in (0, 1, 5, scores.shape[2]):
            found, best, columns = guesses(pieces, given, count)
            torch.testing.assert_close(found.double(), scores, rtol=1e-5, atol=1e-5)
            assert best.shape == columns.shape == (2, nodes, count)
            if not count:
                continue
            likeliest = scores.topk(count, dim=-1).values
            torch.testing.assert_close(scores.gather(2, columns), likeliest, rtol=1e-5, atol=1e-5)
            assert all(len(set(row)) == count for row in columns.flatten(0, 1).tolist())
            whole = scores.logsumexp(-1, keepdim=True) if count > 1 else 0
            torch.testing.assert_close(best.double(), likeliest - whole, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_of_equal_ones_the_first_and_nothing_surer_than_sure() -> None:
    scores = torch.zeros(1, 1, 40)
    scores[0, 0, [7, 9, 30]] = 2.0
    assert guesses([scores], ([], [], []), 3)[2].tolist() == [[[7, 9, 30]]]
    scores = torch.full((1, 1, 40), -200.0)
    scores[0, 0, 5] = 77.7
    best = guesses([scores], ([0], [5], [3e6]), 2)[1]
    assert -1e-4 < float(best[0, 0, 0]) <= 0


@torch.no_grad()
def test_what_is_impossible_stays_so() -> None:
    scores = torch.full((1, 2, 20), float("-inf"))
    scores[0, 1, 4] = 1.0
    found, best, columns = guesses([scores], ([], [], []), 2)
    assert torch.equal(found, scores)
    assert best[0, 1].tolist() == [0.0, float("-inf")]
    assert columns[0, 1, 0] == 4
    assert bool((best[0, 0] == float("-inf")).all() | best[0, 0].isnan().all())
