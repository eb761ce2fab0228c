# SPDX-License-Identifier: Apache-2.0
"""Positions that are counted by ids: of a pass of several columns as in passes of one column each."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hf_polyspec.host.counted_places import CountedPlaces


class _Counting(torch.nn.Module):
    padding_idx = 1

    @staticmethod
    def create_position_ids_from_input_ids(input_ids: torch.Tensor, padding_idx: int, held: int = 0) -> torch.Tensor:
        mask = input_ids.ne(padding_idx).long()
        return (mask.cumsum(1) + held) * mask + padding_idx

    def forward(self, ids: torch.Tensor, held: int) -> Any:
        return self.create_position_ids_from_input_ids(ids, self.padding_idx, held=held)


TEXT = torch.tensor([[5, 1, 6, 7, 1, 8, 9, 1, 1, 4], [5, 6, 6, 7, 8, 8, 1, 9, 1, 4]])
PROMPT = 4


def plain(module: _Counting) -> torch.Tensor:
    """As plain generation's passes count: the prompt at once, then a column each."""
    steps = [(0, PROMPT), *((j, j + 1) for j in range(PROMPT, TEXT.shape[1]))]
    return torch.cat([module(TEXT[:, start:end], start) for start, end in steps], dim=1)


@pytest.mark.parametrize("cuts", [[10], [4, 10], [6, 9, 10], [5, 6, 10], [4, 5, 6, 7, 8, 9, 10]])
def test_a_padding_id_moves_nothing_behind_it(cuts: list[int]) -> None:
    module = _Counting()
    wanted, places, found, start = plain(module), CountedPlaces(torch.nn.Sequential(module)), [], 0
    for end in cuts:
        with places.of([end - PROMPT] * 2):
            found.append(module(TEXT[:, start:end], start))
        start = end
    assert torch.equal(torch.cat(found, dim=1), wanted)
    assert not vars(module).keys() & {"create_position_ids_from_input_ids"}, "the model is as it was"
    assert not torch.equal(module(TEXT, 0), wanted), "else this test shows nothing"


def test_somebody_elses_method_stays() -> None:
    module = _Counting()
    mine = vars(module).setdefault("create_position_ids_from_input_ids", lambda ids, padding, held: ids)
    with CountedPlaces(module).of([3]):
        assert vars(module)["create_position_ids_from_input_ids"] is not mine
    assert vars(module)["create_position_ids_from_input_ids"] is mine
