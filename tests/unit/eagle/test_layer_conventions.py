# SPDX-License-Identifier: Apache-2.0
"""Layer lists of published heads: the convention is told apart, or guessed aloud."""

from __future__ import annotations

import pytest

from hf_polyspec.eagle.formats.layers import listed_layers

KEY = "eagle_aux_hidden_state_layer_ids"


@pytest.mark.parametrize("depth", [12, 28, 30, 32, 36, 48, 61, 80, 94])
def test_default_lists_tell_their_convention_wherever_they_stand(depth: int) -> None:
    inputs = [2, depth // 2, depth - 3]
    outputs = [1, depth // 2 - 1, depth - 4]
    for config in (
        {KEY: inputs},
        {KEY: outputs},
        {"eagle_config": {KEY: inputs}},
        {"eagle_config": {KEY: outputs}},
    ):
        assert listed_layers(config, speculators=False) == inputs


def test_published_lists() -> None:
    assert listed_layers({"eagle_config": {KEY: [1, 46, 90]}}, speculators=False) == [2, 47, 91]
    assert listed_layers({"eagle_config": {KEY: [1, 17, 32]}}, speculators=False) == [2, 18, 33]
    assert listed_layers({KEY: [2, 30, 57]}, speculators=True) == [2, 30, 57]


def test_speculators_lists_are_inputs_even_when_they_look_otherwise() -> None:
    assert listed_layers({KEY: [1, 15, 28]}, speculators=True) == [1, 15, 28]


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"eagle_config": {KEY: [3, 9, 20]}}, [4, 10, 21]),
        ({"eagle_config": {KEY: [2, 9, 20]}}, [3, 10, 21]),
        ({KEY: [1, 9, 20]}, [1, 9, 20]),
        ({KEY: [3, 9, 20]}, [3, 9, 20]),
        ({"target_layer_ids": [3, 9, 20]}, [4, 10, 21]),
        ({"target_layer_ids": [1, 2, 3, 4, 5]}, [2, 3, 4, 5, 6]),
    ],
)
def test_other_lists_are_read_by_place_with_a_warning(config: dict[str, object], expected: list[int]) -> None:
    with pytest.warns(UserWarning, match="feature_layer_ids"):
        assert listed_layers(config, speculators=False) == expected


def test_two_lists_that_differ_by_one_leave_no_doubt() -> None:
    config = {"eagle_config": {KEY: [2, 16, 29]}, KEY: [3, 17, 30]}
    assert listed_layers(config, speculators=False) == [3, 17, 30]


def test_the_same_numbers_in_both_places_are_states_unless_they_are_the_default_outputs() -> None:
    for ids, states in (([3, 17, 30], [3, 17, 30]), ([1, 15, 28], [2, 16, 29]), ([2, 16, 29], [2, 16, 29])):
        assert listed_layers({"eagle_config": {KEY: ids}, KEY: ids}, speculators=False) == states
    assert listed_layers({"eagle_config": {KEY: [0, 14, 27]}, KEY: [1, 15, 28]}, speculators=False) == [1, 15, 28]


@pytest.mark.parametrize("config", [{}, {KEY: None}, {KEY: []}, {"eagle_config": None}, {"eagle_config": {KEY: []}}])
def test_no_list(config: dict[str, object]) -> None:
    assert listed_layers(config, speculators=False) is None


@pytest.mark.parametrize("ids", [[1, -2, 3], ["a", 1, 2], [1.5, 2, 3], [True, 2, 3]])
def test_nonsense_is_refused(ids: list[object]) -> None:
    with pytest.raises(ValueError, match="layer numbers"):
        listed_layers({KEY: ids}, speculators=False)
