# SPDX-License-Identifier: Apache-2.0
"""A drafter that says more than comes true is believed less, by how sure it said it was."""

from __future__ import annotations

import random

import pytest
import torch
from clockwork import LAW, VOCABULARY, Clock, OwnRows, Teller

from hf_polyspec.control.columns import LOOK, Columns
from hf_polyspec.control.pass_seconds import PassSeconds
from hf_polyspec.control.sureness import TRUST, Sureness
from hf_polyspec.exactness.context import Context, Prompt
from hf_polyspec.levels.base import Drafter
from hf_polyspec.levels.verifier import Verifier


def rows(*ids: list[int]) -> Context:
    return Context(list(ids), Prompt.apart([1] * len(ids), range(len(ids))))


def shown(sureness: Sureness, chance: float, right: list[bool]) -> None:
    """So many drafts of one token, and whether the text went on with it."""
    for one in right:
        sureness.offered(rows([7]), [[3]], [[chance]])
        sureness.came(rows([7, 3 if one else 4]))


def test_what_is_said_with_a_chance_comes_true_as_often_as_it_did() -> None:
    sureness, dice = Sureness(), random.Random(0)
    assert sureness.corrected([0.6, 0.3]) == pytest.approx([0.6, 0.3])
    shown(sureness, 0.6, [dice.random() < 0.2 for _ in range(400)])
    # about 50 count, of which 8 or 12 came true, and so many are taken on trust
    assert sureness.corrected([0.6])[0] == pytest.approx(0.2 + 0.4 * TRUST / 54, abs=0.1)
    assert sureness.corrected([0.9])[0] == pytest.approx(0.9)
    # a second token is as sure as its own share of the chance says
    assert sureness.corrected([0.9, 0.54])[1] == pytest.approx(0.9 * sureness.corrected([0.6])[0])


def test_nothing_is_believed_more_than_it_says() -> None:
    sureness = Sureness()
    shown(sureness, 0.4, [True] * 50)
    assert sureness.corrected([0.4]) == pytest.approx([0.4])
    assert sureness.corrected([0.0, 0.0]) == [0.0]


def test_a_row_is_known_by_its_name_and_looked_at_once() -> None:
    sureness = Sureness()
    sureness.offered(rows([1], [2], [3]), [[5], [], [6]], [[0.5], [], [0.5]])
    one = Prompt.apart([1], [2])
    sureness.came(Context([[3]], one))  # it has not gone on
    sureness.came(Context([[3, 9]], one))
    assert sureness.corrected([0.5]) == [0.5]
    sureness.offered(rows([1], [2], [3]), [[5], [], [6]], [[0.5], [], [0.5]])
    sureness.came(Context([[3, 9, 9]], Prompt(1, None, torch.zeros(1, 1), rows=(2,))))
    assert sureness.corrected([0.5])[0] == pytest.approx(TRUST * 0.5 / (1 + TRUST))


def _late(credit: float) -> tuple[Columns, Drafter, Context]:
    """Columns of two rows after a thousand rounds, whose drafter takes a millisecond, and what may still be lost."""
    clock = Clock()
    drafter = Teller(clock, lambda: 0.0, lambda: 0.0)
    columns = Columns(
        Verifier(OwnRows(clock, lambda tokens: 1.0, lambda: 1.0, 4), drafter, name="t"), PassSeconds(lambda count: 1.0)
    )
    context = Context([[1], [2]], Prompt(1, None, torch.zeros(2, 1, dtype=torch.long)))
    columns._turn, columns._credit, columns._places, columns._lengths = 1000, credit, context.places, [1, 1]
    columns._one = 1.0
    columns._known(drafter, context, [3, 3]).seconds = 0.001
    return columns, drafter, context


def test_a_look_that_is_not_taken_costs_no_credit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Near the end of a batch no column is worth anything, and nobody is asked."""
    columns, drafter, context = _late(0.01)
    for worth, credit in (([0, 0], 0.01), ([3, 3], 0.01 - LOOK * 0.001)):
        monkeypatch.setattr(columns, "_worthwhile", lambda rooms, worth=worth: worth)
        offered = columns._offered(drafter, context, [3, 3], LAW, VOCABULARY, ())
        assert (offered is None) == (not any(worth))
        assert columns._credit == pytest.approx(credit)


def test_what_wins_is_asked_however_much_was_lost() -> None:
    """A trial that was dear leaves less than nothing to lose."""
    columns, drafter, context = _late(-1.0)
    for gain, asked in ((0.002, True), (0.0, False)):
        columns._known(drafter, context, [3, 3]).gain = gain
        assert (columns._offered(drafter, context, [3, 3], LAW, VOCABULARY, ()) is not None) == asked
