# SPDX-License-Identifier: Apache-2.0
"""The control of a chain that was measured beforehand: run it, keep an account, step down while it loses.

Setups form a ladder: the whole chain, the target over its drafter, the target alone. Every round of the target is
booked against what the target alone would have taken for the same tokens. An account that is overdrawn means a step
down; a step up is tried again after a while, with small sizes, that may lose no more than a share of what was saved.
All of it is decided between two rounds, from rounds that are over (law 2).
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Sequence
from functools import partial

from ..exactness.context import Context
from ..host.lending import FEW, WORTH
from ..levels.emission import Emission
from ..levels.verifier import Verifier
from ..telemetry.counters import Check, Decision
from .costs import BLOCKS, DRAFTS, Costs
from .cutting import Cut
from .ending import ending_of
from .heads import Heads
from .ladder import ladder_of, passes_by, tells
from .ledger import CREDIT, SHARE, SHORTEST_WAIT, START, Account, Ledger, at_first, wait_after
from .pace import BEHIND, EVERY, Usual
from .risks import Risks
from .setups import PLAIN, Chain, Setup, spine
from .shares import shared_out, tell_left, valued

PATIENCE, LONGER = 2, 4
"""Rounds in a row that a middle may lose which is expected to be right, and one that was: two come by bad luck."""
TRIAL = 1
"""Most tokens of blocks and drafts in a trial; they double with every round that does not lose."""
WATCHED = 4
"""Tokens of blocks at most while a head below the middle is on trial."""
ROWS_TRIAL = 2
"""The same where there are several rows, whose rounds nothing limits by what they may lose."""
ENOUGH = 6
"""Rounds after which what was tried again is no longer on trial."""
SHARE_OF_ROWS = 0.015
"""Of the time generated in, what may be lost where there are several rows."""
LAST = 16
"""Nothing is tried in the last tokens of a text."""
RIGHT = 0.95
"""The same in texts for which a middle is made."""
WORTH_A_TRIAL = 0.05
"""Of the time that what runs takes, what a setup that is tried again might save at least."""
HOPED = 0.8
"""Share of a middle's tokens that is expected to be right when it is tried again, at least."""


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
        self.columns = shared_out(top, costs.gauge, costs.learnt) if shares else []
        self.costs = costs
        self._joining = joining
        self.clock = clock
        self.decisions: list[Decision] = []
        self._several = False
        self._cuts: list[Cut] = []
        self._ending = ending_of(self.chain, costs)
        if tells(self.chain.leaf):  # whoever asks it
            self._cuts = [Cut(verifier, partial(self._checked, verifier.index)) for verifier in self.chain.verifiers]
        self._steps = ladder_of(self.chain)
        self.standing = costs.standing.copied(len(self.ladder) - 1)
        self.heads = Heads(self.chain.leaf, costs, self.standing)
        self._risks = Risks(self.chain, costs, self.heads)
        self._passes_by = passes_by(self.chain)
        self.setup = self._own = PLAIN
        self.emitted = 0.0
        self.ledger = Ledger()
        self._account: Account | None = None
        self._before: tuple[int, Account] | None = None
        self._rows, self._alone, self._start, self._surely = 1, True, 0.0, 0.0
        self._reason, self._usual, self._alike, self._began = "start", Usual(), 0, clock()
        for level in self.chain.verifiers:
            level.observer = self.observe

    # What the loop calls

    def before(self, context: Context, limits: list[int]) -> None:
        """Choose how the next round is run."""
        if self._goes_on(context, limits) or self._rows_go_on(limits):
            self._allow()
            return
        self._rows, self._alone = max(1, sum(limit > 0 for limit in limits)), len(limits) == 1
        if not self._start:
            self._start, self._surely = at_first(max(limits, default=1))
        self._meet(len(limits) > 1)
        if not self._joining:
            tell_left(self.columns, limits)
        if self._account is None:  # what a profile promises has yet to be seen on a text
            self._account = self._opened(not self.standing.tokens)
        self._step(context, max(limits, default=1))
        self._own = self._at_most(self._sized(self.standing.place), self._account.most)
        self._run(self._afforded(context))
        self._allow()

    def after(self, emission: Emission) -> None:
        """Book the round."""
        seconds = self.clock() - self._began
        emitting = [row.emitted for row, tokens in zip(emission.counted, emission.tokens, strict=True) if tokens]
        tokens = sum(emitting) / max(1, len(emitting))
        self.emitted += tokens
        self.standing.tokens += tokens
        reads = emission.passed.fed > 1 + self._offered(emission)
        worth = valued(self.columns, emission, tokens) if self._several else tokens
        gain = worth * self._plain_seconds() - seconds
        if len(self.setup.levels) < 3 and not any(emission.drafted) and self._rows == 1:
            gain = 0.0  # it was a round of the target alone, whatever was expected of that
        if not reads:
            self.standing.passed += seconds / self._plain_seconds()
            self.ledger.book(gain, seconds)
        elif self._rows == 1:  # what was read had to be, what was drafted behind it had not
            self.ledger.book(min(0.0, self._risks.behind(emission) + (tokens - 1) * self._plain_seconds()), 0.0)
        if self._account is not None and not reads and self.setup.levels == self._own.levels:
            self._account.book(gain, seconds, tokens)
            if self._account.most is not None and gain >= 0:
                self._account.most *= 2

    def finish(self) -> None:
        """The generation is over: keep what was learnt, and give drafters back as they came."""
        self.costs.standing = self.standing
        self.costs.learnt.update((own.level.index, own.learnt) for own in self.columns)
        if self._ending is not None:
            self._ending.level.ending = None
        self.chain.restore()

    def observe(self, check: Check) -> None:
        """A verifier has judged a proposal: learn the machine's pace, and acceptance."""
        learns = not self._usual.is_like_the_last(check)
        for columns in self.columns:
            columns.observe(check, learns)
        if not learns:
            return
        once = self.costs.observe(check.level, check.columns, check.seconds, check.offered if self._rows == 1 else None)
        self._began += once  # what is compiled on the way is nobody's loss: as if the round had begun later
        if check.source is None or not any(check.drafted):
            return
        source = self.chain.levels[check.source]
        # Where a long draft has passed a middle by, only what came before it is the middle's own.
        own = source.checked if isinstance(source, Verifier) else [0] * len(check.drafted)
        if self._ending is not None and source is self._ending.level and len(own) == 1:
            self._ending.judged(min(own[0], check.accepted[0]))
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
        without = leaf is not None and leaf.tells_chances if self._several else bool(self._cuts)
        return self._steps[:-1] if without else self._steps

    @property
    def _cutting(self) -> bool:
        """Whether drafts are cut by their own chances."""
        return bool(self._cuts) and not self._several

    def _meet(self, several: bool) -> None:
        """Rows share out their columns where there are several."""
        self._several = several and bool(self.columns)
        for cut in self._cuts:
            cut.idle = self._several or (cut.level.ending is not None and not several)
        if self.standing.place >= len(self.ladder):
            self.standing.place, self._account = len(self.ladder) - 1, None

    def _goes_on(self, context: Context, limits: list[int]) -> bool:
        """Whether a row goes on as it did, without a middle or a head: no step down is near, and none up is due."""
        account, place, setup = self._account, self.standing.place, self.setup
        if account is None or account.most is not None or self._several or not len(limits) == self._rows == 1:
            return False
        same = len(setup.levels) < 3 and setup == self._own and setup.levels == self._steps[place]
        if not same or (limits[0] >= LAST and any(self._may_try(above, context) for above in range(place))):
            return False
        usual = self._cutting and not self.heads.known and not account.overdrawn
        return len(setup.levels) == 1 or (usual and self._risks.worst(setup, cutting=True) <= self._left(place))

    def _rows_go_on(self, limits: list[int]) -> bool:
        """Whether as many rows of several go on as did: most of what is chosen for them is chosen column by column."""
        account, rows = self._account, sum(limit > 0 for limit in limits)
        self._alike += 1
        same = rows == self._rows and (len(limits) > 1) is self._several
        if account is None or account.most is not None or not self._several or account.overdrawn or not same:
            self._alike = 0
        if self._alike % EVERY == 0:
            return False
        if not self._joining:
            tell_left(self.columns, limits)
        return True

    def _step(self, context: Context, room: int) -> None:
        account, place = self._account, self.standing.place
        assert account is not None
        last, left = len(self.ladder) - 1, self._left(place)
        if place < last and (account.overdrawn or self._hopeless(place)):
            told = self._plain_seconds(), self.standing.waits.get(place, 0.0), self._rows > 1, self._believes(place)
            wait = self.standing.waits[place] = wait_after(account, *told)
            self.standing.due[place] = self.standing.passed + wait
            below = next(lower for lower in range(place + 1, last + 1) if lower == last or self._due(lower))
            self._move(below, "it loses" if account.overdrawn else "the middle does not pay")
        elif place < last and self._risk(place, context) > left:
            self._move(place + 1, "too much to lose")
        elif account.most is not None and account.rounds >= ENOUGH and account.balance >= 0:
            self.standing.waits.pop(place, None)
            account.most, self._reason = None, "it pays again"
        elif room >= LAST and (due := [above for above in range(place) if self._may_try(above, context)]):
            above = due[-1]
            if self._hopeless(above):
                self.costs.middle.hope(HOPED)  # what is not asked is never seen to be right again
            if not self._hopeless(above):
                self._move(above, "trial")
            else:
                self.standing.due[above] = self.standing.passed + SHORTEST_WAIT

    def _due(self, place: int) -> bool:
        """Whether a setup that lost has waited long enough."""
        return self.standing.passed >= self.standing.due.get(place, 0.0)

    def _may_try(self, place: int, context: Context) -> bool:
        """Whether a setup is to be tried again."""
        return self._due(place) and self._may_win(place) and self._risk(place, context) <= self._left(place)

    def _may_win(self, place: int) -> bool:
        """Whether a setup could save some of the time that rounds of one token take now, were its middle a good one."""
        assert self._account is not None
        if not self._has_middle(place):
            return True
        return self._account.idle * (1 - 1 / self.costs.most_of_blocks(RIGHT, self._rows)) > WORTH_A_TRIAL

    def _move(self, place: int, reason: str) -> None:
        assert self._account is not None
        before, self._before = self._before, (self.standing.place, self._account)
        self.standing.place, self._reason = place, reason
        if before is not None and before[0] == place > self._before[0] and before[1].most is None:
            self._account = before[1]  # it has paid, and was left for a trial only
        else:
            self._account = self._opened(True)

    def _opened(self, on_trial: bool) -> Account:
        most = (TRIAL if self._rows == 1 else ROWS_TRIAL) if on_trial else None
        share = SHARE if self._rows == 1 else SHARE_OF_ROWS
        found = Account(CREDIT * self._plain_seconds(), most=most, missed=self._reason == "trial", share=share)
        if self._believes(self.standing.place):
            found.patience = LONGER if self.costs.middle.proven else PATIENCE
        return found

    def _hopeless(self, place: int) -> bool:
        """Whether a setup has a middle that promises nothing, whatever the drafter wins."""
        return self._has_middle(place) and self.costs.block(self._rows) == 0

    def _believes(self, place: int) -> bool:
        """Whether a setup has a middle of which more is known than how its last rounds went."""
        return self._ending is not None and self._alone and self._has_middle(place)

    def _has_middle(self, place: int) -> bool:
        return len(self.ladder[place]) > 2

    def _left(self, place: int) -> float:
        """Seconds that the next round may lose at a place."""
        if self._rows > 1 or self._several:
            return math.inf
        start = self._start if self._has_middle(place) and self.costs.middle.proven else START
        sure = self._cutting and not self._has_middle(place) and not self.heads.known  # each draft is expected to win
        left = self.ledger.left(self._plain_seconds(), start, self._surely if sure else 0.0)
        account = self._account
        if account is None or account.most is None or account.balance <= 0:
            return left
        return min(left, START * self._plain_seconds() + account.balance)

    def _risk(self, place: int, context: Context) -> float:
        """Seconds that the smallest round of a setup may lose."""
        if self._rows > 1 or self._several:
            return 0.0
        return self._risks.least(self.ladder[place], context, cutting=self._cutting)

    def _afforded(self, context: Context) -> Setup:
        """The setup at this place, or as much of it as may be lost."""
        left = self._left(self.standing.place)
        if left == math.inf or self._own == PLAIN:
            return self._own
        found = self._risks.afforded(self._own, left, context, cutting=self._cutting)
        last = self.standing.place == len(self.ladder) - 1
        return PLAIN if found is None and last else found or self._risks.smallest(self._own.levels)

    def _allow(self) -> None:
        """A round begins: drafts take no more columns, however likely they say they are, than may be lost."""
        left = self._left(self.standing.place)
        if left < math.inf and len(self.setup.levels) > 1:
            left = max(0.0, left - self._risks.worst(self.setup, cutting=self._cutting))
        for one in (*self._cuts, self._ending):
            if one is not None:
                one.spare = left
        self._began = self.clock()

    def _at_most(self, setup: Setup, most: int | None) -> Setup:
        return setup if most is None else setup.at_most(most, leaf=not self._cutting)

    def _sized(self, place: int) -> Setup:
        """The setup at a place, at the sizes that promise most."""
        levels = self.ladder[place]
        if len(levels) == 1:
            return PLAIN
        sizes, head = [], None
        rows = 1 if self._several else self._rows  # else each row's share of the columns is decided round by round
        if self._passes_by and len(levels) > 2:
            middle, length = self.chain.verifiers[-1], self._passes_by
            # A draft that is cut where the target's columns no longer pay is one that the target had better check.
            middle.direct_tokens = length if self._cutting or self.costs.passing_by_pays(rows) else 0
            middle.runner.borrows_from = FEW if middle.direct_tokens or self._several else WORTH
        for above, level in itertools.pairwise(levels):
            if isinstance(self.chain.levels[level], Verifier):
                sizes.append(self._block(rows))
            elif self.heads.known and not self.heads.beside:
                sizes.append(max(1, self.heads.tokens(above, rows)))
            else:
                # Where each draft is cut by its own chances, those before it need not say how long it may be.
                longest = max(DRAFTS) if self._cutting else self.costs.draft(self._checks_long_drafts(above), rows)
                sizes.append(longest)
                if self.heads.known:  # it can only guess under the level whose states it reads
                    head = self.heads.tokens(above, rows) if above == level - 1 else 0
        return Setup(levels, tuple(sizes), head=head)

    def _block(self, rows: int) -> int:
        """Most tokens of a middle's blocks."""
        best = self.costs.block(rows)
        if not best or self._ending is None or not self._alone:  # beside rows that have ended none is asked, either
            return max(1, best)
        # An `Ending` looks at every token, but whether a head is worth its time is looked at between two blocks.
        return min(best, WATCHED) if self.heads.on_trial else max(BLOCKS)

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
        self.chain.note(setup, self.setup if self.decisions else None, self.emitted)
        self.chain.apply(setup)
        changed = not self.decisions or setup.levels != self.setup.levels
        self.setup = setup
        reason = self._reason if changed else "sizes"
        self.decisions.append(Decision(self.emitted, setup.levels, setup.sizes, 0, reason, None))

    def _plain_seconds(self) -> float:
        if self._several and (gauge := self.costs.gauge(0)).passes:
            return gauge.seconds(self._rows)
        return self.costs.seconds(0, self._rows)

    def _offered(self, emission: Emission) -> int:
        """Most columns that a pass of the target had to judge: with more it has read what it had not."""
        trees = self.chain.leaf is not None and self.chain.leaf.grows_trees
        return 2 * sum(self.setup.sizes) if trees else max(emission.drafted, default=0) + BEHIND
