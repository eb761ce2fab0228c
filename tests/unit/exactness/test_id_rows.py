# SPDX-License-Identifier: Apache-2.0
"""Texts that grow, are taken back and change places give the ids they hold, and little is written for them."""

from __future__ import annotations

import random

import pytest
import torch

from hf_polyspec.exactness import id_rows
from hf_polyspec.exactness.id_rows import IdRows

CPU = torch.device("cpu")


def test_whatever_becomes_of_rows_their_ids_are_given() -> None:
    dice = random.Random(3)
    texts, kept = IdRows(), [[1], [2, 3], [4]]
    for _ in range(200):
        for row in range(len(kept)):
            cut = dice.randint(0, len(kept[row]))
            kept[row] = kept[row][:cut] + [dice.randrange(50) for _ in range(dice.randint(1, 9))]
        if dice.random() < 0.1:
            kept = [list(kept[dice.randrange(len(kept))]) for _ in range(dice.randint(1, 4))]
        found = texts.of([list(row) for row in kept], CPU)
        assert found.shape == (len(kept), max(map(len, kept)))
        assert all(found[b, : len(row)].tolist() == row for b, row in enumerate(kept))


def test_only_what_is_new_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[int] = []
    made = torch.tensor

    def counted(values: list[int]) -> torch.Tensor:
        written.append(len(values))
        return made(values)

    texts, text = IdRows(), list(range(5000))
    texts.of([text], CPU)
    monkeypatch.setattr(id_rows.torch, "tensor", counted)
    for step in range(20):
        texts.of([[*text, *range(step), 7]], CPU)
    assert sum(written) <= 2 * 20
