# SPDX-License-Identifier: Apache-2.0
"""Which rows get how many columns: the most tokens a second of all choices, from what passes cost, or none."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable

import pytest
import torch
from clockwork import LAW, Clock, ClockedDrafter, ClockedRunner, OwnRows, Run, Teller, truth

from hf_polyspec.control import Costs, PassSeconds, Shares, SteadyControl
from hf_polyspec.control.allotment import LEAST, allotted, worths
from hf_polyspec.control.columns import Columns
from hf_polyspec.control.row_rates import RowRates
from hf_polyspec.control.shares import MANY, shares_of
from hf_polyspec.exactness.context import Context, Prompt
from hf_polyspec.exactness.distributions import LawMaker
from hf_polyspec.exactness.proposal import Proposal
from hf_polyspec.levels.suffix import SuffixDrafter
from hf_polyspec.levels.verifier import Verifier

Seconds = Callable[[float], float]


def straight(fixed: float, column: float) -> Seconds:
    return lambda columns: fixed + column * columns


def stepped(columns: float) -> float:
    """Flat to 12 columns, as a small model's passes are on a CPU."""
    return 15.0 + 0.8 * max(0.0, columns - 12)


def rate(chances: list[list[float]], counts: list[int], seconds: Seconds, rows: int, depth_seconds: float) -> float:
    gain = sum(sum(row[:count]) for row, count in zip(chances, counts, strict=True))
    return (rows + gain) / (seconds(rows + sum(counts)) + max(counts, default=0) * depth_seconds)


def some_chances(dice: random.Random, rows: int) -> list[list[float]]:
    found = []
    for _ in range(rows):
        reached, row = 1.0, []
        for _ in range(dice.randint(0, 3)):
            reached *= dice.choice([0.1, 0.5, 0.8, 0.95, 1.0])
            row.append(reached)
        found.append([chance for chance in row if chance >= LEAST])
    return found


@pytest.mark.parametrize("seconds", [straight(10, 0.1), straight(10, 1.0), straight(0, 1.0), stepped])
@pytest.mark.parametrize("depth_seconds", [0.0, 3.0])
def test_no_other_choice_is_quicker(seconds: Seconds, depth_seconds: float) -> None:
    dice = random.Random(5)
    drafted = 0
    for _ in range(40):
        chances = some_chances(dice, rows := dice.randint(1, 4))
        chosen = allotted(chances, seconds, rows, depth_seconds=depth_seconds)
        every = itertools.product(*(range(len(row) + 1) for row in chances))
        best = max(rate(chances, list(counts), seconds, rows, depth_seconds) for counts in every)
        assert rate(chances, chosen, seconds, rows, depth_seconds) == pytest.approx(best, rel=1e-9)
        drafted += sum(chosen)
    assert drafted or seconds(2) == 2 * seconds(1)


def test_a_rectangle_is_as_wide_for_all() -> None:
    chances = [[0.9, 0.8, 0.7], [0.9], []]
    assert allotted(chances, straight(10, 0.01), 3, rectangular=True) == [3, 1, 0]
    # Two columns more for each of three rows, of which two are computed for nothing.
    assert allotted(chances, straight(10, 6.0), 3, rectangular=True) == [0, 0, 0]
    assert allotted(chances, straight(10, 6.0), 3) == [2, 1, 0]


def test_what_does_not_pay_is_not_drafted() -> None:
    assert allotted([[0.4, 0.2]] * 16, straight(0, 1.0), 16) == [0] * 16  # a column costs a token
    assert allotted([[], []], stepped, 2) == [0, 0]
    assert allotted([[0.99] * 8], straight(10, 0.1), 1, depth_seconds=20.0) == [0]
    assert allotted([[LEAST / 2]], straight(10, 0.0), 1) == [0]


def test_columns_that_cost_nothing_go_to_the_likeliest_rows() -> None:
    chances = [[0.1], [0.9, 0.8], [0.5]]
    found = allotted([*chances, *[[] for _ in range(6)]], lambda columns: 10 if columns <= 12 else 100, 9)
    assert found[:3] == [0, 2, 1]


def test_dearer_columns_are_never_more() -> None:
    dice = random.Random(3)
    for _ in range(50):
        chances = some_chances(dice, 4)
        counts = [sum(allotted(chances, straight(10, cost), 4)) for cost in (0.01, 0.1, 0.5, 1, 3, 10)]
        assert counts == sorted(counts, reverse=True)


def whole_batch(right: list[float], seconds: Seconds, weighed: bool) -> float:
    """Expected seconds of a batch of 64 tokens a row, whose rows' drafts are right so often, in plain ones."""
    left, passed, rows = [64.0] * len(right), 0.0, len(right)
    while any(going := [count > 1e-6 for count in left]):
        chances = [
            [share**depth for depth in range(1, 1 + min(12, int(count)))] if one else []
            for share, count, one in zip(right, left, going, strict=True)
        ]
        worth = worths([math.ceil(max(0.0, count)) for count in left], seconds) if weighed else None
        counts = allotted(chances, seconds, sum(going), worth=worth)
        passed += seconds(sum(going) + sum(counts))
        left = [
            count - one * (1 + sum(row[:number]))
            for count, one, row, number in zip(left, going, chances, counts, strict=True)
        ]
    return passed / (64 * seconds(rows))


@pytest.mark.parametrize("seconds", [straight(5.2, 0.66), straight(9.0, 0.22)])
@pytest.mark.parametrize("right", [[0.9] * 4 + [0.0] * 4, [0.0] + [0.8] * 7, [0.9] * 8 + [0.0] * 8])
def test_a_batch_lasts_as_long_as_its_slowest_row(seconds: Seconds, right: list[float]) -> None:
    """Where a row has nothing to draft, drafts of the others only buy that they wait for it."""
    assert whole_batch(right, seconds, weighed=True) <= 1.025 < whole_batch(right, seconds, weighed=False)


def test_rows_that_are_alike_draft_as_where_rows_join() -> None:
    for right in (0.5, 0.7, 0.9):
        equal = whole_batch([right] * 8, straight(9.0, 0.22), weighed=False)
        assert whole_batch([right] * 8, straight(9.0, 0.22), weighed=True) == pytest.approx(equal)
    # Those that have more to draft are ahead soon, and leave the columns to those that have not.
    mixed, seconds = [0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2], straight(9.0, 0.22)
    assert whole_batch(mixed, seconds, weighed=True) < 0.94 * whole_batch(mixed, seconds, weighed=False)


@pytest.mark.parametrize(("rows", "column"), [(8, 1.0), (16, 0.5)])
def test_few_tokens_that_come_by_chance_win_no_pass(rows: int, column: float) -> None:
    """Of 64 tokens each row wins one or two, and some row none: the batch takes as many passes as without."""
    dice, seconds, spent = random.Random(rows), straight(9.0, column), {"told": 0.0, "not told": 0.0}
    for _ in range(60):
        offers = [[[0.55] if dice.random() < 0.08 else [] for _ in range(rows)] for _ in range(64)]
        right = [[dice.random() < 0.55 for _ in range(rows)] for _ in range(64)]
        for way in spent:
            left = [64] * rows
            for offered, comes in zip(offers, right, strict=True):
                if not any(left):
                    break
                coming = 0.044 * max(left) if way == "told" else math.inf
                chances = [own if count > 1 else [] for own, count in zip(offered, left, strict=True)]
                going = sum(count > 0 for count in left)
                counts = allotted(chances, seconds, going, worth=worths(left, seconds, coming))
                spent[way] += seconds(going + sum(counts))
                won = [bool(count and one) for count, one in zip(counts, comes, strict=True)]
                left = [max(0, count - 1 - more) for count, more in zip(left, won, strict=True)]
    plain = 60 * 64 * seconds(rows)
    assert spent["told"] <= (1 + 1e-9) * plain < 1.005 * plain < spent["not told"]


def test_what_all_rows_win_is_worth_as_much_as_one_row_has_to_win() -> None:
    even, seconds = [50, 50, 50, 50], straight(9, 0.25)
    assert worths(even, seconds, math.inf) == pytest.approx([1.0] * 4)
    assert worths(even, seconds, 0.0) == pytest.approx([1 - 9.25 / 10] * 4)  # a column of its own is saved all the same
    few, many = worths(even, seconds, 4.0)[0], worths(even, seconds, 400.0)[0]
    assert 1 - 9.25 / 10 < few < many < 1
    assert worths([50, 0, 0, 1], seconds, 0.5) == pytest.approx(worths([50, 0, 0, 1], seconds), rel=0.05)


def test_a_token_is_worth_a_pass_in_the_row_that_ends_last() -> None:
    assert worths([50, 50, 50, 50], straight(9, 0.25)) == pytest.approx([1.0] * 4)
    assert worths([1 << 62, (1 << 62) - 900], straight(9, 0.25)) == pytest.approx([1.0, 1.0])
    assert worths([30], straight(9, 0.25)) == [1.0]
    assert worths([0, 0], straight(9, 0.25)) == [1.0, 1.0]
    # A pass over four takes 10, of which 9.25 whatever it reads; over an ended row nothing is won.
    found = worths([64, 32, 60, 0, 32], straight(9, 0.25))
    assert found[1] == found[4] == pytest.approx(0.075 + 4 * 0.925 * 0.005 / 1.51)
    assert found[0] == pytest.approx(0.075 + 4 * 0.925 / 1.51)
    assert found[2] == pytest.approx(0.075 + 4 * 0.925 * 0.5 / 1.51)
    # Where a column costs next to nothing, rows that will hardly be the last draft as well.
    free = straight(10, 0.001)
    assert allotted([[0.9], [0.9]], free, 2, worth=worths([64, 32], free)) == [1, 1]


def noised(dice: random.Random, seconds: float) -> float:
    """A busy machine: now and then a pass takes much longer."""
    return seconds * (dice.uniform(1, 1.2) if dice.random() < 0.9 else dice.uniform(2, 10))


@pytest.mark.parametrize("by_size", [True, False])
@pytest.mark.parametrize("known", [True, False])
def test_the_cost_of_a_column_is_found(known: bool, by_size: bool) -> None:
    """A machine three times as slow as in the profile, where columns cost twice as much of a pass."""
    dice = random.Random(1)
    shape = straight(10, 0.5)
    gauge = PassSeconds(shape if known else None, by_size=by_size)
    for _ in range(200):
        columns = dice.choice([8, 8, 8, 10, 13, 20, 30])
        gauge.add(columns, noised(dice, 30 + 3.0 * columns))
    for columns in (8, 16, 32):
        assert gauge.seconds(columns) == pytest.approx(1.1 * (30 + 3.0 * columns), rel=0.12)
    assert gauge.seconds(30) - gauge.seconds(8) == pytest.approx(1.1 * 3.0 * 22, rel=0.3)


def test_passes_of_one_size_leave_what_is_expected_of_others() -> None:
    gauge = PassSeconds(straight(10, 0.5))
    for _ in range(300):
        gauge.add(8, 28.0)  # twice as slow
    assert gauge.seconds(8) == pytest.approx(28.0, rel=0.01)
    assert gauge.seconds(24) == pytest.approx(44.0, rel=0.03)


def test_columns_never_win_time() -> None:
    for by_size in (False, True):
        gauge = PassSeconds(by_size=by_size)
        for columns in (32, 8) * 20:
            gauge.add(columns, 40.0 - columns)
        assert gauge.seconds(64) >= gauge.seconds(8) > 0


def test_a_first_column_that_is_dear_is_seen() -> None:
    """Eight rows on a line with the passes of fewer; what is drafted beside them begins with a step."""
    dice = random.Random(2)
    gauge = PassSeconds(straight(10, 0.4), by_size=True)
    for _ in range(300):
        columns = dice.choice([8, 8, 8, 8, 8, 8, 8, 9, 10, 5, 2])
        gauge.add(columns, (20 + 0.4 * columns + (2 if columns > 8 else 0)) * dice.uniform(0.98, 1.02))
    for columns in (8, 9, 10, 12):
        step = gauge.seconds(columns) - gauge.seconds(8)
        assert step == pytest.approx(0.4 * (columns - 8) + (2 if columns > 8 else 0), abs=0.6)


def test_devices_differ_in_what_is_expected() -> None:
    one, other = PassSeconds(device=torch.device("cpu")), PassSeconds(device=torch.device("meta"))
    one.add(1, 1.0)
    other.add(1, 1.0)
    assert one.seconds(32) > 1.5 > 1.2 > other.seconds(32)


def test_rows_have_rates_of_their_own() -> None:
    rates = RowRates()
    for _ in range(12):
        rates.add(0, 4, 4)
        rates.add(1, 4, 0)
    good, bad, new = rates.chances(0, 6), rates.chances(1, 6), rates.chances(2, 6)
    assert good == sorted(good, reverse=True)
    assert len(good) == 6
    assert good[3] > 0.6
    assert bad[0] < 0.3
    assert good[0] > new[0] > bad[0], "a row that has just joined is like the others"


def test_a_row_whose_text_changes_is_seen() -> None:
    rates = RowRates()
    for _ in range(40):
        rates.add(0, 3, 3)
    before = rates.chances(0, 3)[2]
    for _ in range(12):
        rates.add(0, 3, 0)
    assert before > 0.8
    assert rates.chances(0, 1)[0] < 0.5


def test_rows_that_have_left_are_forgotten() -> None:
    rates = RowRates()
    rates.add(0, 1, 0)
    rates.add(1, 1, 1)
    rates.keep({1})
    assert set(rates._rows) == {1}


# With levels


def pass_seconds(columns: float) -> float:
    return 1 + 0.03 * (columns - 1)


def generated(right: float, rows: int, tokens: int, draft_seconds: float = 0.0) -> tuple[float, ClockedDrafter]:
    """Seconds of a batch under "auto", in those of the target alone."""
    clock = Clock()
    drafter = ClockedDrafter(clock, lambda: draft_seconds, lambda: right)
    runner = ClockedRunner(clock, pass_seconds, lambda: 1.0, 4)
    top = Verifier(runner, drafter, name="target")
    costs = Costs([[[columns, pass_seconds(columns)] for columns in (1, 2, 4, 8, 16, 32)]], 0.9)
    run = Run(
        clock,
        top,
        tokens,
        prompt=1,
        rows=rows,
        control=lambda top, clock: SteadyControl(top, costs, shares=True, clock=clock),
    )
    return run.seconds / (tokens * pass_seconds(rows)), drafter


@pytest.mark.parametrize("rows", [4, 16])
@pytest.mark.parametrize("draft_seconds", [0.0, 0.1])
def test_a_batch_in_which_nothing_is_right_loses_little(rows: int, draft_seconds: float) -> None:
    share, drafter = generated(0.0, rows, 128, draft_seconds)
    assert share <= 1.03
    assert len(drafter.asked) < 128 / 4, "three rounds of four are plain"


def test_what_a_draft_costs_is_found_out_with_a_short_one() -> None:
    """Of a drafter whose token takes as long as the target's pass, nobody drafts long before that is known."""
    share, drafter = generated(0.9, 8, 64, draft_seconds=1.2)
    assert drafter.asked[0] <= 2
    assert sum(drafter.asked) <= 3
    assert share <= 1.06


def test_what_a_level_reads_before_a_trial_is_part_of_its_cost() -> None:
    """A middle that was right and cheap, then wrong and left alone: what was emitted since it reads in ten passes, of
    which the drafts that were timed while it was asked in every round say nothing."""
    clock, right = Clock(), [0.95]
    runner = ClockedRunner(clock, pass_seconds, lambda: 1.0, 4)
    last, reads = [0.0], [0]

    def seconds() -> float:
        behind, last[0] = clock.now - last[0], clock.now
        reads[0] += behind > 4
        return 10.1 if behind > 4 else 0.1

    drafter = ClockedDrafter(clock, seconds, lambda: right[0])
    top = Verifier(runner, drafter, name="target", draft_limit=4)
    top.begin(0, 8, 8)
    top.stats.clock = clock
    gauge = PassSeconds(pass_seconds)
    shares = Shares(top, lambda _: gauge)
    context = Context([[0]] * 8, Prompt(1, None, torch.zeros(8, 1, dtype=torch.long)))
    began = 0.0
    for turn in range(440):
        if turn == 40:
            assert reads == [0]
            right[0] = 0.0
        if turn == 80:
            began = clock.now
        emission = top.round(context, [2000] * 8, LawMaker([], False, torch.device("cpu")))
        shares.after(emission)
        context = context.extended(emission.tokens)
    # A hundredth of the time is for trials: one of ten passes in a thousand, and the first on credit.
    assert 1 <= reads[0] <= 2
    assert clock.now - began <= (1.01 + 10 / 360) * 360 * pass_seconds(8)


class OfRows(Teller):
    """Rows of even number repeat themselves, the others never do."""

    def propose(self, context: Context, limits: list[int], law: LawMaker) -> Proposal:
        return super().propose(context, [limit * (row % 2 == 0) for row, limit in enumerate(limits)], law)


@pytest.mark.parametrize("joining", [False, True])
def test_columns_know_whether_rows_join(joining: bool) -> None:
    clock = Clock()
    drafter = OfRows(clock, lambda: 0.0, lambda: 0.9)
    runner = OwnRows(clock, lambda columns: 0.52 + 0.066 * columns, lambda: 1.0, 4)
    top = Verifier(runner, drafter, name="target")
    top.begin(0, 8, 8)
    for level in (top, drafter):
        level.stats.clock = clock
    gauge = PassSeconds(lambda columns: 0.52 + 0.066 * columns)
    shares = Shares(top, lambda index: gauge, joining=joining)
    context = Context([[truth(i) for i in range(4)] for _ in range(8)], Prompt(4, None, torch.arange(4).expand(8, -1)))
    while any(limits := [max(0, 68 - len(row)) for row in context.ids]):
        shares.before(context, limits)
        context = context.extended(top.round(context, limits, LAW).tokens)
    assert (clock.now <= 1.03 * 64 * (0.52 + 0.066 * 8)) is not joining


def test_what_only_the_last_row_wins_is_won() -> None:
    """One row has more to write than the other seven, and drafts alone: its tokens are passes that nobody runs."""
    clock = Clock()
    drafter = ClockedDrafter(clock, lambda: 0.1, lambda: 0.9)
    cost = straight(0.52, 0.066)
    top = Verifier(OwnRows(clock, cost, lambda: 1.0, 4), drafter, name="target", draft_limit=4)
    top.begin(0, 8, 8)
    for level in (top, drafter):
        level.stats.clock = clock
    costs = Costs([[[columns, cost(columns)] for columns in (1, 2, 4, 8, 16, 32)]], 0.9)
    control = SteadyControl(top, costs, shares=True, clock=clock)
    context = Context([[truth(0)] for _ in range(8)], Prompt(1, None, torch.zeros(8, 1, dtype=torch.long)))
    goals = [301, *[201] * 7]
    while any(limits := [max(0, goal - len(row)) for goal, row in zip(goals, context.ids, strict=True)]):
        control.before(context, limits)
        emission = top.round(context, limits, LAW)
        control.after(emission)
        context = context.extended(emission.tokens)
    assert [decision.levels for decision in control.decisions if decision.levels == (0,)] == []
    assert clock.now < 0.8 * (200 * cost(8) + 100 * cost(1))


def test_few_rows_draft_what_was_ordered() -> None:
    clock = Clock()
    top = Verifier(OwnRows(clock, pass_seconds, lambda: 1.0, 4), Teller(clock, lambda: 0.0, lambda: 0.9), name="target")
    top.begin(0, 8, 8)
    assert shares_of(top, MANY - 1, torch.device("cpu")) is None
    assert isinstance(shares_of(top, MANY, torch.device("cpu")), Shares)


def of_three(passes_by: bool, middle_seconds: float, right: float) -> tuple[float, int]:
    """Seconds of 200 rounds' worth of eight rows in those of the target alone, and passes of the middle."""
    clock = Clock()
    drafter = Teller(clock, lambda: 0.001, lambda: right)
    below = OwnRows(clock, lambda columns: middle_seconds * pass_seconds(columns), lambda: 0.9, 3)
    middle = Verifier(below, drafter, name="middle", block_size=3)
    above = OwnRows(clock, pass_seconds, lambda: 1.0, 4)
    top = Verifier(above, middle, name="target")
    gauges = {0: PassSeconds(pass_seconds), 1: PassSeconds(lambda columns: middle_seconds * pass_seconds(columns))}
    top.begin(0, 8, 8)
    for level in (top, middle, drafter):
        level.stats.clock = clock
    shares = Shares(top, gauges.__getitem__)
    for columns in shares.columns:
        columns.passes_by &= passes_by
    ids = [truth(i) for i in range(4)]
    context = Context([list(ids) for _ in range(8)], Prompt(4, None, torch.arange(4).expand(8, -1)))
    while any(limits := [max(0, 204 - len(row)) for row in context.ids]):
        context = context.extended(top.round(context, limits, LAW).tokens)
        assert top.source is middle, "whoever was passed by is asked again"
    assert context.ids == [[truth(i) for i in range(204)]] * 8
    return clock.now / (200 * pass_seconds(8)), len(below.fed)


def test_a_middle_that_does_not_pay_is_passed_by() -> None:
    """What its drafter alone promises, the chain reaches; where that has nothing to offer, the middle drafts."""
    alone, past = of_three(False, 0.8, 0.9), of_three(True, 0.8, 0.9)
    assert past[0] < 0.8 * alone[0]
    assert past[1] < 20
    dear, cheap = of_three(True, 0.8, 0.0), of_three(True, 0.02, 0.0)
    assert dear[0] <= 1.03, "neither pays: nothing is lost"
    assert cheap[0] <= 1.05 * of_three(False, 0.02, 0.0)[0] < 0.8


def test_a_batch_wins_where_drafts_are_right() -> None:
    assert generated(0.95, 4, 128)[0] < 0.6
    # A pass over 16 rows of two tokens takes 1.33 of one over 16: hardly anything is to be won, and nothing lost.
    assert generated(0.6, 16, 128)[0] <= 1.03


def test_a_draft_that_nobody_drew_is_cut_where_its_tokens_do_not_pay() -> None:
    repeats, new = [1, 2, 3, 4, 5, 6] * 4, list(range(1, 7))
    clock = Clock()
    for cost, wanted in ((0.0, 5), (0.9, 0)):
        runner = ClockedRunner(clock, pass_seconds, lambda: 1.0, 4)
        runner.own_rows = True
        drafter = SuffixDrafter()
        top = Verifier(runner, drafter, name="target")
        top.begin(0, 2, 8)
        seconds = PassSeconds()
        seconds.pace, seconds.cost = 0.1, cost
        columns = Columns(top, seconds)
        context = Context([list(repeats), list(new)], Prompt.apart([24, 6], [0, 1]))
        law = LawMaker([], False, torch.device("cpu"))
        found = columns.ask(drafter, context, [5, 5], law, 8, ())
        assert [len(row) for row in found.tokens] == [wanted, 0]
        assert found.origins == [[1] * wanted, []]
        assert drafter.stats.drafted == wanted, "what was left out was not offered"


class Late(Teller):
    """Its rows begin to repeat themselves when they are half done."""

    def propose(self, context: Context, limits: list[int], law: LawMaker) -> Proposal:
        begun = [len(ids) > 60 for ids in context.ids]
        return super().propose(context, [limit * one for limit, one in zip(limits, begun, strict=True)], law)


def test_what_has_promised_nothing_for_long_is_looked_at_again() -> None:
    clock = Clock()
    drafter = Late(clock, lambda: 0.0, lambda: 1.0)
    runner = OwnRows(clock, lambda columns: 0.52 + 0.066 * columns, lambda: 1.0, 4)
    top = Verifier(runner, drafter, name="target")
    top.begin(0, 8, 8)
    for level in (top, drafter):
        level.stats.clock = clock
    shares = Shares(top, lambda index: PassSeconds(lambda columns: 0.52 + 0.066 * columns))
    context = Context([[truth(i) for i in range(4)] for _ in range(8)], Prompt(4, None, torch.arange(4).expand(8, -1)))
    while any(limits := [max(0, 132 - len(row)) for row in context.ids]):
        shares.before(context, limits)
        context = context.extended(top.round(context, limits, LAW).tokens)
    assert clock.now < 0.85 * 128 * (0.52 + 0.066 * 8)
