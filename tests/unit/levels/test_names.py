# SPDX-License-Identifier: Apache-2.0
"""How members of a chain are called."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from hf_polyspec.levels.names import name_of, short_name
from hf_polyspec.levels.suffix import SuffixDrafter


@pytest.mark.parametrize(
    "name", ["model", "owner/model", "/a/folder/model", "folder/model/", r"C:\folder\model", "model/"]
)
def test_the_last_part_of_a_path(name: str) -> None:
    assert short_name(name) == "model"


def test_a_model_is_called_after_where_it_came_from_and_a_drafter_by_its_own_name() -> None:
    assert name_of(SimpleNamespace(name_or_path="owner/model", name="other")) == "model"
    assert name_of(SuffixDrafter()) == "suffix"
    assert name_of(SimpleNamespace(name_or_path="")) == name_of(object()) == ""
