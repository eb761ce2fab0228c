# SPDX-License-Identifier: Apache-2.0
"""What is learnt from a copy's tokens: how large its errors are, and whether it is right where it is sure."""

from __future__ import annotations

import math
import random

import pytest

from hf_polyspec.control.leads import FINEST, RATIO, Leads, scale_of


def made_up(scale: float, count: int, seed: int) -> tuple[list[float], list[bool]]:
    """Leads of a model between two ids, and whether a copy with normal errors of their difference says the same.

    What the copy says is what is seen: its lead is the model's and the error, whichever id it is for.
    """
    dice = random.Random(seed)
    leads, right = [], []
    for _ in range(count):
        lead = abs(dice.gauss(0, 4 * scale)) + 1e-9
        leads.append(lead)
        right.append(dice.gauss(0, scale) < lead)
    return leads, right


@pytest.mark.parametrize("scale", [0.05, 0.2, 1.0, 6.0])
def test_the_scale_of_made_up_errors_is_found(scale: float) -> None:
    """Within a factor of two: of 500 trials of a scale with half as many tokens one missed, so a false alarm in at most
    one of twelve choices of these 4 times 10 seeds, which are fixed."""
    for seed in range(10):
        found = scale_of(*made_up(scale, 800, seed))
        assert found is not None
        assert scale / 2 < found < 2 * scale


def test_nothing_is_known_of_nothing() -> None:
    assert scale_of([], []) is None
    assert Leads().scale is None
    assert Leads().chance(100.0) == 0.5


def test_scales_are_those_that_are_told_apart() -> None:
    assert Leads(0.2).scale == pytest.approx(FINEST * RATIO ** round(math.log(0.2 / FINEST, RATIO)))
    assert scale_of([5.0] * 8, [True] * 8) == pytest.approx(FINEST), "errors that change nothing may be as fine"
    assert scale_of([5.0] * 8, [True, False] * 4) == pytest.approx(FINEST * RATIO**23, rel=0.5)


def test_a_measured_scale_stands_for_some_tokens_only() -> None:
    leads, right = made_up(1.0, 200, 5)
    following = Leads(0.05)
    for lead, one in zip(leads, right, strict=True):
        following.learn([lead], int(one))
    assert following.scale is not None
    assert 0.5 < following.scale < 2


def test_chances_rise_with_the_lead() -> None:
    leads = Leads(0.3)
    chances = [leads.chance(lead) for lead in (0.0, 0.1, 0.3, 1.0, 4.0)]
    assert chances == sorted(chances)
    assert chances[0] == pytest.approx(0.5)
    assert chances[2] == pytest.approx(0.84, abs=0.06), "one scale ahead"
    assert chances[4] > 0.999


def test_a_copy_that_is_wrong_though_sure_is_believed_less_and_comes_back() -> None:
    leads = Leads(0.3)
    for _ in range(20):
        leads.learn([3.0], 1)
    before = leads.chance(3.0)
    assert before > 0.95
    for _ in range(20):
        leads.learn([3.0], 0)
    assert leads.chance(3.0) < 0.6 * before
    assert leads.chance(0.6) < 0.6 * Leads(0.3).chance(0.6), "all chances are lower"
    for _ in range(60):
        leads.learn([3.0], 1)
    assert leads.chance(3.0) > 0.9


def test_what_is_behind_a_refused_token_says_nothing() -> None:
    one, other = Leads(0.3), Leads(0.3)
    one.learn([2.0, 0.1, 0.7, 0.2], 1)
    other.learn([2.0, 0.1], 1)
    assert vars(one) == vars(other)
    whole = Leads(0.3)
    whole.learn([2.0, 0.1], 2)
    assert whole.chance(0.1) > one.chance(0.1)
