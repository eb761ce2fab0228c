# SPDX-License-Identifier: Apache-2.0
"""The control of a chain that was measured beforehand: run it, keep an account, step down while it loses.

Setups form a ladder: the whole chain, the target over its drafter, the target alone. Every round of the target is
booked against what the target alone would have taken for the same tokens. An account that is overdrawn means a step
down; a step up is tried again after a while, with small sizes, that may lose no more than a share of what was saved.
All of it is decided between two rounds, from rounds that are over (law 2).
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from ..exactness.context import Context
from ..host.lending import FEW, WORTH
from ..host.release import input_device
from ..levels.base import Drafter
from ..levels.emission import Emission
from ..levels.joined import JoinedDrafter
from ..levels.verifier import Verifier
from ..telemetry.counters import Check, Decision
from .costs import DRAFTS, Costs, Standing
from .cutting import Cut
from .heads import Heads
from .setups import PLAIN, Chain, Setup, spine
from .shares import shared_out, tell_left

CREDIT = 0.5
"""Plain tokens that a setup may lose at first."""
SHARE = 0.015
"""Of the time generated in, what may be lost besides."""
SHORTEST_WAIT = 24.0
LONGEST_WAIT = 1024.0
UNSEEN_WAIT = 96.0
"""The shortest where nothing was lost, since what was known promised nothing: a middle that is tried reads the text."""
TRIAL = 2
"""Most tokens of blocks and drafts in a trial; they double with every round that does not lose."""
ENOUGH = 6
"""Rounds after which what was tried again is no longer on trial."""
LAST = 16
"""Nothing is tried in the last tokens of a text."""
HOPED = 0.8
"""Share of a middle's tokens that is expected to be right when it is tried again, at least."""


@dataclass
class _Account:
    """What the setup that runs has won and lost, in seconds.

    Attributes:
        balance: never more than one round may lose: what was won on one text is not for losing on another.
        credit: that it may lose; rounds: it ran; most: tokens it may hand up at once, None for as many as pay.
        missed: whether its levels may have to read, in its first round, what they have missed.
        total: won and lost in all.
    """

    credit: float
    balance: float = 0.0
    rounds: int = 0
    most: int | None = None
    missed: bool = False
    total: float = 0.0

    def book(self, gain: float, seconds: float) -> None:
        """A round that took so long has won or lost against the target alone."""
        self.rounds += 1
        self.total += gain
        if self.missed and self.rounds == 1:  # what is read once says nothing of the rounds to come
            gain = max(gain, 0.0)
        self.balance = min(max(self.credit, seconds), self.balance + gain)

    @property
    def overdrawn(self) -> bool:
        return self.balance < -self.credit


class SteadyControl:
    """Steers one generation of "auto".

    Args:
        top: the target, begun, with the levels below it.
        costs: what is known of the chain; learns.
        shares: whether the columns of rows that come and go are shared out (`Columns`) while there are several, which
            then decides how much each drafts; a row that is alone is run as without.
        joining: whether other rows take the place of those that end, so that a token is worth the same in all of them.
        clock: seconds from some moment on.

    Attributes:
        decisions: every change of the setup, with its reason.
        setup: how the chain is run now.
    """

    def __init__(
        self,
        top: Verifier,
        costs: Costs,
        *,
        shares: bool = False,
        joining: bool = False,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.chain = Chain(spine(top))
        self.columns = shared_out(top, costs.gauge) if shares else []
        self.costs = costs
        self._joining = joining
        self.clock = clock
        self.decisions: list[Decision] = []
        self._several = False
        self._steps = _ladder(self.chain)
        before = costs.standing
        self.standing = Standing(min(before.place, len(self.ladder) - 1), before.tokens, dict(before.due))
        self.standing.waits = dict(before.waits)
        self.heads = Heads(self.chain.leaf, costs, self.standing)
        self._passes_by = _passes_by(self.chain)
        self._cuts: list[Cut] = []
        if _tells(self.chain.leaf):  # whoever asks it
            self._cuts = [Cut(verifier, partial(self._checked, verifier.index)) for verifier in self.chain.verifiers]
        self.setup = PLAIN
        self.emitted = 0.0
        self._account: _Account | None = None
        self._rows = 1
        self._reason = "start"
        self._began = clock()
        for level in self.chain.verifiers:
            level.observer = self.observe

    # What the loop calls

    def before(self, context: Context, limits: list[int]) -> None:
        """Choose how the next round is run."""
        self._rows = max(1, sum(limit > 0 for limit in limits))
        self._meet(len(limits) > 1)
        if not self._joining:
            tell_left(self.columns, limits)
        if self._account is None:
            # What a profile promises has yet to be seen on a text.
            self._account = self._opened(None if self.standing.tokens else TRIAL)
        self._step(max(limits, default=1))
        self._run(self._sized())
        self._began = self.clock()

    def after(self, emission: Emission) -> None:
        """Book the round."""
        seconds = self.clock() - self._began
        emitting = [row.emitted for row, tokens in zip(emission.counted, emission.tokens, strict=True) if tokens]
        tokens = sum(emitting) / max(1, len(emitting))
        self.emitted += tokens
        self.standing.tokens += tokens
        reads = emission.passed.fed > 1 + self._longest()
        if self._account is not None and not reads and self.setup != PLAIN:
            gain = self._valued(emission, tokens) * self._plain_seconds() - seconds
            self._account.book(gain + SHARE * seconds, seconds)
            if self._account.most is not None and gain >= 0:
                self._account.most *= 2

    def _valued(self, emission: Emission, tokens: float) -> float:
        """Tokens of a row, as many as they are worth (`Columns.worth`): most rows may only have waited for the last."""
        worth = self.columns[0].worth if self._several else None
        if worth is None:
            return tokens
        rows = [
            (value, row.emitted)
            for value, row, own in zip(worth, emission.counted, emission.tokens, strict=True)
            if own
        ]
        whole = sum(value for value, _ in rows)
        return sum(value * emitted for value, emitted in rows) / whole if whole else tokens

    def finish(self) -> None:
        """The generation is over: keep what was learnt, and give drafters back as they came."""
        self.costs.standing = self.standing
        self.chain.restore()

    def observe(self, check: Check) -> None:
        """A verifier has judged a proposal: learn the machine's pace, and acceptance."""
        for columns in self.columns:
            columns.observe(check)
        self.costs.observe(check.level, check.columns, check.seconds)
        if check.source is None or not any(check.drafted):
            return
        source = self.chain.levels[check.source]
        # Where a long draft has passed a middle by, only what came before it is the middle's own.
        own = source.checked if isinstance(source, Verifier) else [0] * len(check.drafted)
        for row, (drafted, accepted, first) in enumerate(zip(check.drafted, check.accepted, own, strict=True)):
            first = min(first, drafted)
            if first:
                self.costs.middle.add(first, min(first, accepted))
            if drafted == first or accepted < first:
                continue
            if check.source == self.chain.last and self.heads.drafted(row):
                self.heads.observe(drafted, accepted)
            else:
                self.costs.leaf.add(drafted - first, accepted - first)
        if check.offered and check.source == self.chain.last and all(map(self.heads.drafted, range(len(own)))):
            self.costs.observe_draft(check.offered, check.draft_seconds)

    # The ladder

    @property
    def ladder(self) -> Sequence[tuple[int, ...]]:
        """Setups, from the whole chain down."""
        leaf = self.chain.leaf
        # Where what does not pay is left out token by token, the target need not be left alone for that.
        return self._steps[:-1] if self._several and leaf is not None and leaf.tells_chances else self._steps

    def _meet(self, several: bool) -> None:
        """Rows share out their columns where there are several."""
        self._several = several and bool(self.columns)
        for cut in self._cuts:
            cut.idle = self._several
        if self.standing.place >= len(self.ladder):
            self.standing.place, self._account = len(self.ladder) - 1, None

    def _step(self, room: int) -> None:
        account, place = self._account, self.standing.place
        assert account is not None
        if place < len(self.ladder) - 1 and (account.overdrawn or self._hopeless(place)):
            least = SHORTEST_WAIT if account.overdrawn else UNSEEN_WAIT
            lost = 0.0 if account.most is None else -account.total / self._plain_seconds()
            wait = max(least, lost / SHARE, min(LONGEST_WAIT, 2 * self.standing.waits.get(place, 0.0)))
            self.standing.waits[place] = wait
            self.standing.due[place] = self.standing.tokens + wait
            self._move(place + 1, "it loses" if account.overdrawn else "the middle does not pay", TRIAL)
        elif account.most is not None and account.rounds >= ENOUGH and account.balance >= 0:
            self.standing.waits.pop(place, None)
            account.most, self._reason = None, "it pays again"
        elif place and room >= LAST and self.standing.tokens >= self.standing.due.get(place - 1, 0.0):
            if self._hopeless(place - 1):
                self.costs.middle.hope(HOPED)  # what is not asked is never seen to be right again
            if not self._hopeless(place - 1):
                self._move(place - 1, "trial", TRIAL)
            else:
                self.standing.due[place - 1] = self.standing.tokens + SHORTEST_WAIT

    def _move(self, place: int, reason: str, most: int | None) -> None:
        self.standing.place, self._reason = place, reason
        self._account = self._opened(most)

    def _opened(self, most: int | None) -> _Account:
        return _Account(CREDIT * self._plain_seconds(), most=most, missed=self._reason == "trial")

    def _hopeless(self, place: int) -> bool:
        """Whether a setup has a middle that promises nothing, whatever the drafter wins."""
        return self._has_middle(place) and self.costs.block(self._rows) == 0

    def _has_middle(self, place: int) -> bool:
        return len(self.ladder[place]) > 2

    def _sized(self) -> Setup:
        """The setup at this place, at the sizes that promise most."""
        place = self.standing.place
        levels = self.ladder[place]
        if len(levels) == 1:
            return PLAIN
        sizes, head = [], None
        rows = 1 if self._several else self._rows  # else each row's share of the columns is decided round by round
        if self._passes_by and len(levels) > 2:
            middle, length = self.chain.verifiers[-1], self._passes_by
            middle.direct_tokens = length if self.costs.passing_by_pays(rows) else 0
            middle.runner.borrows_from = FEW if middle.direct_tokens else WORTH
        for above, level in itertools.pairwise(levels):
            if isinstance(self.chain.levels[level], Verifier):
                sizes.append(max(1, self.costs.block(rows)))
            elif self.heads.known and not self.heads.beside:
                sizes.append(max(1, self.heads.tokens(above, rows)))
            else:
                # Where each draft is cut by its own chances, those before it need not say how long it may be.
                cuts = self._cuts and not self._several
                longest = max(DRAFTS) if cuts else self.costs.draft(self._checks_long_drafts(above), rows)
                sizes.append(longest)
                if self.heads.known:  # it can only guess under the level whose states it reads
                    head = self.heads.tokens(above, rows) if above == level - 1 else 0
        setup = Setup(levels, tuple(sizes), head=head)
        most = None if self._account is None else self._account.most
        return setup if most is None else setup.at_most(most)

    def _checks_long_drafts(self, above: int) -> int:
        """The level that checks a drafter's long drafts: they pass a middle by."""
        level = self.chain.levels[above]
        return 0 if isinstance(level, Verifier) and level.direct_tokens else min(above, len(self.costs.tables) - 1)

    def _checked(self, above: int, columns: float) -> float:
        """Seconds of the pass over a draft that a level has asked for."""
        return self.costs.seconds(self._checks_long_drafts(above), columns)

    def _run(self, setup: Setup) -> None:
        if self.decisions and setup == self.setup:
            return
        for index, level in enumerate(self.chain.levels):
            self._note(index, level, setup)
        self.chain.apply(setup)
        changed = not self.decisions or setup.levels != self.setup.levels
        self.setup = setup
        reason = self._reason if changed else "sizes"
        self.decisions.append(Decision(self.emitted, setup.levels, setup.sizes, 0, reason, None))

    def _note(self, index: int, level: object, setup: Setup) -> None:
        size, before = setup.size_of(index), self.setup.size_of(index) if self.decisions else None
        if index == 0 or size == before:
            return
        for part in getattr(level, "parts", [level]):
            part.stats.switched_off += int(before is not None and size == 0)
            part.stats.switched_on += int(before == 0)
            part.stats.sizes.append((self.emitted, size))

    def _plain_seconds(self) -> float:
        if self._several and (gauge := self.costs.gauge(0)).passes:
            return gauge.seconds(self._rows)
        return self.costs.seconds(0, self._rows)

    def _longest(self) -> int:
        """Most tokens that a pass of the target can be offered in the setup that runs."""
        return 2 * sum(self.setup.sizes)


def _tells(leaf: Drafter | None) -> bool:
    """Whether a level, or what joins a head in it, says how likely its drafts are."""
    return leaf is not None and getattr(leaf, "branch", leaf).tells_chances


def _passes_by(chain: Chain) -> int:
    """From how many tokens on what the last level finds may pass the middle above it by; 0 for never."""
    above = chain.verifiers[-1]
    if isinstance(chain.leaf, JoinedDrafter) and len(chain.verifiers) > 1:
        return chain.leaf.passes_by(input_device(above.runner.model))
    return above.direct_tokens


def _ladder(chain: Chain) -> Sequence[tuple[int, ...]]:
    """Setups, the whole chain first, the target alone last."""
    whole = tuple(range(len(chain.levels)))
    steps = [whole]
    if len(whole) > 2 and chain.leaf is not None:
        steps.append((0, chain.last))
    return [*steps, (0,)]
