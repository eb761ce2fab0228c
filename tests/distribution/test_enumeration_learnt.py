# SPDX-License-Identifier: Apache-2.0
"""What one generation under the control of "auto" leaves for the next leaves the law of both alone, and so it is where
rows join and leave, as an engine lets them in and out. Every outcome of every coin, of both texts together.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import steered_rows
from clockwork import Clock
from enumeration import CPU, EXACT, Replay, TableModel, approximations, outcomes
from joined_rows import drawing, off_the_law, written
from steered_rows import PROMPTS, Course, Timed, chain, generated, hurry, measured, off_the_product, tell_time

from hf_polyspec.control import Costs, SteadyControl, columns, known, row_rates
from hf_polyspec.control.columns import Columns
from hf_polyspec.exactness.proposal import Proposal
from hf_polyspec.exactness.row_laws import RowLaws
from hf_polyspec.generation.loop import DecodingLoop
from hf_polyspec.telemetry.counters import Check

SEED = 4


@pytest.fixture(autouse=True)
def _hurries(monkeypatch: pytest.MonkeyPatch) -> None:
    hurry(monkeypatch)
    monkeypatch.setattr(steered_rows, "SLOW", {0: (), 1: (0, 1), 2: (1, 2)})
    monkeypatch.setattr(known, "TIMED", 1)
    monkeypatch.setattr(row_rates, "TRUST", 0.3)
    monkeypatch.setattr(row_rates, "LIKE_OTHERS", 0.5)


def left_by(costs: Costs) -> str:
    """All that a generation leaves."""
    shares = [vars(share) for share in (costs.middle, costs.leaf, costs.head) if share is not None]
    rates = {
        (level, below): (vars(one.rates._all), one.seconds, one.rows, one.timed)
        for level, learnt in costs.learnt.items()
        for below, one in learnt.of.items()
    }
    promises = [learnt.promise for learnt in costs.learnt.values()]
    return str((shares, vars(costs.standing), costs.step, rates, promises, costs.pace))


def nothing(top: Any, before: str) -> None:
    """Lets the second generation be."""


def two_texts(
    tables: Sequence[TableModel],
    rule: str,
    first: Sequence[int],
    second: Sequence[int],
    *,
    says: bool = False,
    tampered: Callable[[Any, Any], None] = nothing,
) -> tuple[float, set[str], dict[str, set[Course]]]:
    """Two generations over what is known of one chain, with so many tokens in their rows.

    Args:
        tampered: with the second's target, told what the first came to.

    Returns:
        How far both texts together are from independent draws of the target's law; all that the first leaves; and by
        that, how the second was run.
    """
    ways: dict[str, set[Course]] = {}

    def program(replay: Replay) -> tuple[Any, None]:
        clock, costs = Clock(), measured(len(tables), says=says)
        texts: list[Any] = []
        carried = ""
        for lengths in (first, second):
            top = chain(tables, rule, clock, len(lengths), says=says)
            control = SteadyControl(top, costs, shares=len(lengths) > 1, clock=clock)
            if texts:
                carried = left_by(costs)
                tampered(top, texts[0])
            text, course = generated(top, control, PROMPTS[: len(lengths)], lengths, replay)
            texts.append(text)
        ways.setdefault(carried, set()).add(course)
        return texts[0] + texts[1], None

    found = {key: weight for key, (weight, _) in outcomes(program).items()}
    rows = PROMPTS[: len(first)] + PROMPTS[: len(second)]
    return off_the_product(found, tables[0], rows, [*first, *second]), set(ways), ways


@pytest.mark.parametrize("rule", ["token", "block"])
@pytest.mark.parametrize(
    ("levels", "first", "second"), [(2, (3,), (3,)), (3, (2,), (3,)), (2, (2, 1), (2, 1)), (3, (2, 1), (2, 1))]
)
def test_a_second_generation(
    rule: str, levels: int, first: tuple[int, ...], second: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it begins with follows from the first one's draws, and how it is run from that; its law does not."""
    if len(first) > 1:  # so dear that drafts pay which were accepted before, and others do not
        monkeypatch.setattr(steered_rows, "ONE", {0: 1.0, 1: 0.2, 2: 0.15})
    off, carried, ways = two_texts(approximations(levels, 2, SEED, Timed), rule, first, second)
    assert off < EXACT
    assert len(carried) > 1, "the first generation's outcome is carried"
    begun = {before: {course[0][:2] for course in courses} for before, courses in ways.items()}
    assert all(len(setups) == 1 for setups in begun.values()), "nothing but that decides how the second begins"
    assert len(set(map(frozenset, ways.values()))) > 1, "and the second is run by it"


@pytest.mark.parametrize("rule", ["token", "block"])
def test_a_batch_after_a_text_of_its_own(rule: str) -> None:
    """Levels that say their chances; what a row that was alone has shown is known of several."""
    off, carried, _ = two_texts(approximations(3, 2, SEED, Timed), rule, (3,), (2, 1), says=True)
    assert off < EXACT
    assert len(carried) > 1


def after_the_first(top: Any, before: Any) -> None:
    """The wrong variant: what the first text ended with says which drawn drafts of the second are left out."""
    genuine = top.ask

    def ask(*given: Any) -> Proposal:
        offered: Proposal = genuine(*given)
        if offered.q is None:
            return offered
        return offered.cut([0 if row[:1] == [before[0][-1]] else len(row) for row in offered.tokens])

    top.ask = ask


@pytest.mark.parametrize("lengths", [(3,), (2, 1)])
def test_what_is_carried_and_meets_a_draw_is_caught(lengths: tuple[int, ...]) -> None:
    tables = approximations(2, 2, SEED, Timed)
    assert two_texts(tables, "token", lengths, lengths, tampered=after_the_first)[0] > 1e-3


# Rows that join.


def joined(
    tables: Sequence[TableModel], rule: str, *, says: bool
) -> tuple[float, set[tuple[Any, ...]], set[tuple[int, ...]]]:
    """Three rows that join and leave one loop, steered as an engine steers it.

    Returns:
        How far their texts are from the law; whom the target asked, round by round (None for nobody), of each course;
        and the tokens that rows were drafted in a round.
    """
    courses: set[tuple[Any, ...]] = set()
    drafting: set[tuple[int, ...]] = set()

    def program(replay: Replay) -> tuple[Any, None]:
        clock = Clock()
        top = chain(tables, rule, clock, 0, says=says)
        control = SteadyControl(top, measured(len(tables), says=says), shares=True, joining=True, clock=clock)
        asked: list[int | None] = []

        def observe(check: Check) -> None:
            asked.append(check.source)
            drafting.add(tuple(check.drafted))
            control.observe(check)

        top.observer = observe

        def begin() -> None:
            top.begin(0, 0, 2)
            tell_time(top, clock)

        loop = DecodingLoop(top, RowLaws([], [], CPU), control=control)
        texts = written(loop, begin, lambda place: drawing(place, replay))
        control.finish()
        courses.add(tuple(asked))
        return texts, None

    found = {key: weight for key, (weight, _) in outcomes(program).items()}
    assert sum(found.values()) == pytest.approx(1, abs=1e-12)
    return off_the_law(found, tables[0]), courses, drafting


@pytest.mark.parametrize("rule", ["token", "block"])
@pytest.mark.parametrize(("levels", "says"), [(2, False), (3, True)])
def test_rows_that_join_under_this_control(rule: str, levels: int, says: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(columns, "SOON", 2)
    off, courses, drafting = joined(approximations(levels, 2, SEED, Timed), rule, says=says)
    assert off < EXACT
    assert any(len(set(course)) > 1 for course in courses), "others are asked while rows come and go"
    assert any(any(row) and not all(row) for row in drafting), "some rows draft, and others do not"


def test_rows_that_join_and_are_cut_after_a_look_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    genuine = Columns.ask

    def looks(self: Columns, *given: Any) -> Proposal:
        offered = genuine(self, *given)
        return offered if offered.q is None else offered.cut([len(row) * (row[:1] == [0]) for row in offered.tokens])

    monkeypatch.setattr(Columns, "ask", looks)
    assert joined(approximations(2, 2, SEED, Timed), "token", says=False)[0] > 1e-3
