# SPDX-License-Identifier: Apache-2.0
"""A norm, products and guesses with their numbers kept give what they give one by one, while rows join and leave."""

from __future__ import annotations

import pytest
import torch

from hf_polyspec.cpu.compiled import compiles

if not compiles():
    pytest.skip("compiled functions do not run here", allow_module_level=True)

from hf_polyspec.cpu.compiled.blocks import rms_norm
from hf_polyspec.cpu.compiled.guesses import guesses
from hf_polyspec.cpu.compiled.product import CompiledProduct
from hf_polyspec.cpu.score_task import ScoreTask

WIDTH, FIXED, ROOM = 48, 70, 20


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("nodes", [1, 5])
@pytest.mark.parametrize("count", [1, 4])
def test_numbers(dtype: torch.dtype, nodes: int, count: int) -> None:
    generator = torch.Generator().manual_seed(0)

    def numbers(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    weight, fixed = numbers(WIDTH), CompiledProduct(numbers(FIXED, WIDTH), None)
    joined = [CompiledProduct(numbers(rows, WIDTH), numbers(rows)) for rows in (3, ROOM, 7)]
    task = ScoreTask(nodes, count, (weight, 1e-5), fixed, ROOM)
    for more in (None, joined[0], joined[0], joined[1], None, joined[2]):
        states = numbers(1, nodes, WIDTH)
        raised = ([0, nodes - 1], [5, 69], [0.7, 2.0]) if more is not joined[1] else ([], [], [])
        normed = rms_norm(states, weight, 1e-5)[0]
        pieces = [fixed(normed)] if more is None else [fixed(normed), more(normed)]
        _, best, columns = guesses(pieces, raised, count)
        task.join(more)
        found = task.run(states, raised)
        assert torch.equal(found[0], best[0])
        assert torch.equal(found[1], columns[0])


def test_states_that_lost_their_memory_are_refused() -> None:
    task = ScoreTask(1, 1, (torch.ones(WIDTH), 1e-5), CompiledProduct(torch.ones(FIXED, WIDTH), None), 0)
    states = torch.ones(1, WIDTH)
    states.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match="hidden states"):
        task.run(states, ([], [], []))
