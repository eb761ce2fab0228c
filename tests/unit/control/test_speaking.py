# SPDX-License-Identifier: Apache-2.0
"""Of two drafters in one level the dear one rests where the other alone promises more; nothing is read in vain."""

from __future__ import annotations

import random
from collections.abc import Callable

import torch
from clockwork import LAW, Clock, ClockedDrafter, OwnRows, Teller, truth

from hf_polyspec.control import PassSeconds, Shares
from hf_polyspec.control.speaking import FARTHEST, may_rest, rounds_ahead, speaker
from hf_polyspec.exactness.context import Context, Prompt
from hf_polyspec.exactness.distributions import LawMaker
from hf_polyspec.exactness.proposal import Proposal
from hf_polyspec.levels.base import Drafter
from hf_polyspec.levels.joined import JoinedDrafter
from hf_polyspec.levels.verifier import Verifier

ROWS, PROMPT = 8, 4


def cost(columns: float) -> float:
    return 0.52 + 0.066 * columns


class Reader(ClockedDrafter):
    """Has to read a row's text before it drafts for it the first time."""

    def __init__(self, clock: Clock, seconds: float, right: float, reading: float) -> None:
        super().__init__(clock, lambda: seconds, lambda: right)
        self.reading = reading
        self.read: set[int] = set()
        self.asks = 0

    def propose(self, context: Context, limits: list[int], law: LawMaker) -> Proposal:
        wanted = {row for row, limit in zip(context.places, limits, strict=True) if limit}
        self.clock.now += self.reading * len(wanted - self.read)
        self.read |= wanted
        self.asks += bool(wanted)
        return super().propose(context, [min(limit, 3) for limit in limits], law)


class Silent(Teller):
    """Has nothing to say."""

    def propose(self, context: Context, limits: list[int], law: LawMaker) -> Proposal:
        return super().propose(context, [0] * len(limits), law)


def run(make: Callable[[Clock], Drafter], tokens: int) -> tuple[float, Drafter]:
    """Seconds of eight rows in those of the target alone, and the level below it."""
    clock = Clock()
    below = make(clock)
    top = Verifier(OwnRows(clock, cost, lambda: 1.0, PROMPT), below, name="target")
    top.begin(0, ROWS, 8)
    for level in (top, below, *getattr(below, "parts", [])):
        level.stats.clock = clock
    shares = Shares(top, lambda index: PassSeconds(cost), joining=True)
    ids = [truth(i) for i in range(PROMPT)]
    context = Context([list(ids)] * ROWS, Prompt(PROMPT, None, torch.arange(PROMPT).expand(ROWS, -1)))
    while any(limits := [max(0, PROMPT + tokens - len(row)) for row in context.ids]):
        shares.before(context, limits)
        context = context.extended(top.round(context, limits, LAW).tokens)
        assert not getattr(below, "rests", False), "it is asked again"
    assert context.ids == [[truth(i) for i in range(PROMPT + tokens)]] * ROWS
    return clock.now / (tokens * cost(ROWS)), below


def test_a_dear_head_rests_and_the_branch_beside_it_drafts_alone() -> None:
    alone, _ = run(lambda clock: Teller(clock, lambda: 0.001, lambda: 0.9), 200)
    both, below = run(
        lambda clock: JoinedDrafter(Reader(clock, 0.6, 0.7, 0.0), Teller(clock, lambda: 0.001, lambda: 0.9)), 200
    )
    assert alone < 0.75
    assert both < 1.05 * alone
    assert isinstance(below, JoinedDrafter)
    assert isinstance(below.head, Reader)
    assert below.head.asks < 20


def test_a_head_that_pays_drafts_where_the_branch_has_nothing_to_say() -> None:
    head, _ = run(lambda clock: Reader(clock, 0.01, 0.9, 0.0), 200)
    both, _ = run(
        lambda clock: JoinedDrafter(Reader(clock, 0.01, 0.9, 0.0), Silent(clock, lambda: 0.001, lambda: 0.9)), 200
    )
    assert head < 0.8
    assert both < 1.05 * head


def test_texts_are_read_only_for_as_many_tokens_as_pay_for_it() -> None:
    short, long = (run(lambda clock: Reader(clock, 0.01, 0.9, 2.0), tokens) for tokens in (10, 200))
    assert isinstance(short[1], Reader)
    assert isinstance(long[1], Reader)
    assert (len(short[1].read), len(long[1].read)) == (1, ROWS)
    assert long[0] < 0.9


def test_who_speaks_and_how_far_is_reckoned() -> None:
    dice = random.Random(0)
    joined = JoinedDrafter(Silent(Clock(), dice.random, dice.random), Teller(Clock(), dice.random, dice.random))
    assert may_rest(joined)
    assert speaker(joined) is joined
    joined.rests = True
    assert not may_rest(joined)
    assert speaker(joined) is joined.branch
    joined.begin(1, 2, 8)
    assert not joined.rests
    assert not may_rest(JoinedDrafter(joined.branch, ClockedDrafter(Clock(), dice.random, dice.random)))
    assert rounds_ahead([0, 40, 60]) == 25
    assert rounds_ahead([0, 0]) == 0
    assert rounds_ahead([1 << 62]) == FARTHEST
