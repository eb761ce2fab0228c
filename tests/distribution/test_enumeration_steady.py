# SPDX-License-Identifier: Apache-2.0
"""The control of "auto" leaves the law alone while it changes levels and sizes within a text: every outcome of every
coin, over one row and over two of unequal lengths, and what it does is looked at.
"""

from __future__ import annotations

from typing import Any

import pytest
from enumeration import EXACT, approximations
from steered_rows import Course, Timed, hurry, off_the_law

from hf_polyspec.control import SteadyControl
from hf_polyspec.exactness.proposal import Proposal

SEED = 4


@pytest.fixture(autouse=True)
def _hurries(monkeypatch: pytest.MonkeyPatch) -> None:
    hurry(monkeypatch)


def set_up(courses: set[Course]) -> set[tuple[int, ...]]:
    """Levels that took part in some round."""
    return {levels for course in courses for levels, _, _ in course}


def changing(courses: set[Course]) -> set[Course]:
    """Texts within which levels were switched off or on."""
    return {course for course in courses if len({levels for levels, _, _ in course}) > 1}


def without_draft(courses: set[Course]) -> bool:
    """Whether in some round but the last nobody drafted, though others of the text had drafts."""
    offered = [[any(drafted) for _, _, drafted in course[:-1]] for course in courses]
    return any(len(set(of_rounds)) > 1 for of_rounds in offered)


@pytest.mark.parametrize("rule", ["token", "block"])
@pytest.mark.parametrize("levels", [2, 3])
def test_one_row(rule: str, levels: int) -> None:
    """In rounds with the middle, without it and of the target alone, in blocks and drafts of one token and of two."""
    off, courses = off_the_law(approximations(levels, 2, SEED, Timed), rule, (5,), shares=False)
    assert off < EXACT
    every = {(0,), (0, 1)} if levels == 2 else {(0,), (0, 2), (0, 1, 2)}
    assert set_up(courses) == every
    assert without_draft(courses)
    assert len(changing(courses)) > 1
    assert {1, 2} <= {size for course in courses for _, sizes, _ in course for size in sizes}
    assert len({course[0][:2] for course in courses}) == 1, "before anything was drawn there is nothing to go by"


@pytest.mark.parametrize("rule", ["token", "block"])
@pytest.mark.parametrize("shares", [False, True])
def test_one_row_over_drafts_that_say_their_chances(rule: str, shares: bool) -> None:
    """They may be cut after a look, and go up past the middle."""
    off, courses = off_the_law(approximations(3, 2, SEED, Timed), rule, (5,), says=True, shares=shares)
    assert off < EXACT
    assert {(0, 2), (0, 1, 2)} <= set_up(courses)
    assert changing(courses)


@pytest.mark.parametrize("rule", ["token", "block"])
def test_two_rows_over_a_drafter(rule: str) -> None:
    """The second ends first; in some rounds one row drafts and the other does not."""
    off, courses = off_the_law(approximations(2, 2, SEED, Timed), rule, (3, 1))
    assert off < EXACT
    assert set_up(courses) == {(0,), (0, 1)}
    assert changing(courses)
    assert without_draft(courses)


@pytest.mark.parametrize(
    ("rule", "lengths", "says"),
    [("token", (3, 1), False), ("block", (2, 2), False), ("token", (3, 1), True), ("block", (3, 1), True)],
)
def test_two_rows_over_a_middle(rule: str, lengths: tuple[int, ...], says: bool) -> None:
    """Some rounds with the middle, some without, over drafts that are drawn and over those that say their chances."""
    off, courses = off_the_law(approximations(3, 2, SEED, Timed), rule, lengths, says=says)
    assert off < EXACT
    assert set_up(courses) == {(0, 2), (0, 1, 2)}
    assert changing(courses)


# The mistakes.


class Meddling(SteadyControl):
    """Cuts a draft that was drawn after `count` has looked at it."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        top = self.chain.verifiers[0]
        genuine = top.ask

        def ask(*given: Any) -> Proposal:
            offered = genuine(*given)
            return offered if offered.q is None else offered.cut([self.count(row) for row in offered.tokens])

        top.ask = ask  # type: ignore[method-assign]

    def count(self, row: list[int]) -> int:
        """Tokens of a row that are left."""
        raise NotImplementedError


class Looking(Meddling):
    """Looks at the draft's tokens."""

    def count(self, row: list[int]) -> int:
        return len(row) if row[:1] == [0] else 0


@pytest.mark.parametrize(("levels", "lengths"), [(2, (4,)), (3, (4,)), (2, (3, 1)), (3, (2, 2))])
def test_a_size_that_looks_at_what_was_drawn_is_caught(levels: int, lengths: tuple[int, ...]) -> None:
    tables = approximations(levels, 2, SEED, Timed)
    off, _ = off_the_law(tables, "token", lengths, shares=len(lengths) > 1, kind=Looking)
    assert off > 1e-3


class Regretting(Meddling):
    """Leaves the middle out of a round that has begun, where its block has turned out short."""

    def count(self, row: list[int]) -> int:
        return 0 if self.chain.levels[1].stats.accepted == 0 else len(row)


def test_a_middle_that_is_left_out_by_what_it_just_drew_is_caught() -> None:
    """That its draft was refused below says something of the tokens in its block."""
    off, _ = off_the_law(approximations(3, 2, SEED, Timed), "token", (4,), shares=False, kind=Regretting)
    assert off > 1e-3
