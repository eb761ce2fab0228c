# SPDX-License-Identifier: Apache-2.0
"""The control of `polyspec_control="online"`: run what is predicted to be quickest, try the rest within a budget."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable
from dataclasses import dataclass

from ..exactness.context import Context
from ..levels.base import Drafter
from ..levels.emission import Emission
from ..levels.verifier import Verifier
from ..planning.theory.cost_model import Prediction
from ..telemetry.counters import Check, Decision
from .budget import Budget, Schedule
from .estimates import Knowledge
from .memory import recall, remember
from .readiness import catch_up_seconds, ready, scout
from .setups import PLAIN, Chain, Forecast, Pair, Setup, spine

TRIAL_ROUNDS = 3
"""Rounds of the target that a trial lasts, if it is not cut short by the budget."""
ENOUGH = 3.0
"""Judged proposals of a pair of levels from which on its acceptance counts as known."""
MARGIN = 0.05
"""A setup must promise this share less time per token to replace another."""
HORIZON = 64
"""A text is expected to go on for as many tokens as it has, and for at least this many (if it may)."""
SHORTEST = 16
"""Nothing is tried in the last tokens of a text: it could not pay any more."""
PROVEN = 8
"""Rounds after which a setup that was quicker than plain decoding is no longer on trial in any sense."""
PLANNING = 0.005
"""Of the time generated in, the share that may go into predicting."""
TRIAL_SIZES = (3, 1)


@dataclass
class _Trial:
    """Something being tried: until when, and what it has cost."""

    setup: Setup
    rounds: int = TRIAL_ROUNDS
    lost: float = 0.0


class OnlineControl:
    """Steers one generation.

    Args:
        top: the target, begun, with the levels below it.
        mode: what changes acceptance besides the models (sampling, temperature); chains are remembered by it.
        clock: seconds from some moment on.

    Attributes:
        decisions: every change of the setup, with its reason.
        setup: how the chain is run now.
    """

    def __init__(self, top: Verifier, *, mode: Hashable = None, clock: Callable[[], float] = time.perf_counter) -> None:
        levels = spine(top)
        self.chain = Chain(levels)
        self.mode = mode
        self.clock = clock
        self.knowledge: Knowledge = recall(levels, mode)
        self.budget = Budget(self.knowledge)
        self.schedule = Schedule(self.knowledge)
        self.decisions: list[Decision] = []
        self.setup = PLAIN
        self.emitted = 0.0
        self.scout = scout
        self._settled_on: tuple[int, ...] = (0,)
        self._needed = 0.0
        self._subsets = self.chain.subsets()
        self._trial: _Trial | None = None
        self._plans: dict[tuple[int, ...], Setup] = {}
        self._turn = 0
        self._started = self._began = clock()
        self._earlier = self.knowledge.elapsed
        self._planning = 0.0
        self._per_token = 0.0
        self._behind = 0.0
        self._rounds = 0
        self._missed: set[int] = set()
        for level in self.chain.verifiers:
            level.observer = self.observe

    # What the loop calls

    def before(self, context: Context, limits: list[int]) -> None:
        """Choose how the next round is run."""
        now = self.clock()
        self.knowledge.elapsed = self._earlier + now - self._started
        rows, room = len(limits), max(limits, default=1)
        if not self.decisions and not self.knowledge.timed_at(0, rows):
            self._run(PLAIN, "start: the target alone, to time it", None)
        elif self.knowledge.timed_at(0, rows) or self._per_token:
            self._decide(context, rows, room, now)
        self._began = self.clock()

    def _decide(self, context: Context, rows: int, room: int, now: float) -> None:
        if self._trial is not None and self._goes_on(rows):
            return
        must = self._trial is not None or self._behind > max(self.budget.left, self._plain_seconds(rows))
        self._end_trial(now)
        if must or not self._per_token or self._planning <= PLANNING * (now - self._started):
            self._choose(context, rows, room)
            self._planning += self.clock() - now

    def after(self, emission: Emission) -> None:
        """Account for the round."""
        now = self.clock()
        emitting = [row.emitted for row, tokens in zip(emission.counted, emission.tokens, strict=True) if tokens]
        tokens = sum(emitting) / max(1, len(emitting))
        self.emitted += tokens
        if self._trial is not None:
            lost = now - self._began - tokens * self._per_token
            self._trial.lost += lost
            self._trial.rounds -= 1
        elif self.setup != PLAIN:
            # The first round reads what was missed, which was reckoned with when it was chosen.
            rows = len(emission.tokens)
            self._behind += now - self._began - tokens * self._plain_seconds(rows) if self._rounds else 0.0
            self._rounds += 1

    def finish(self) -> None:
        """The generation is over: keep what was learnt."""
        now = self.clock()
        self.knowledge.elapsed = self._earlier + now - self._started
        self._end_trial(now)
        self.chain.restore()
        remember(self.chain.levels, self.mode, self.knowledge)

    def observe(self, check: Check) -> None:
        """A verifier has judged a proposal: learn its times and its acceptance."""
        rows = len(check.asked)
        self.knowledge.times(check.level).add(rows * check.fed, check.seconds)
        if check.source is None:
            return
        pair = (check.level, check.source)
        offered, size = check.offered, self.setup.size_of(check.source)
        leaf = check.source == self.chain.last and self.chain.leaf is not None
        tree = self.setup.tree if leaf else 0
        caught_up = check.source not in self._missed
        self._missed.discard(check.source)
        if leaf and offered and caught_up:
            tokens = max(check.nodes, default=0) if tree else offered
            self.knowledge.draft_times(bool(tree)).add(tokens, check.draft_seconds)
        if leaf and not offered and not self._can_have_offered():
            return
        longest = self.chain.depth if tree else size
        judged = [
            (min(asked, longest) if leaf else drafted, drafted, accepted)
            for asked, drafted, accepted in zip(check.asked, check.drafted, check.accepted, strict=True)
            if asked and (leaf or drafted)
        ]
        self.knowledge.agreement(*pair, tree).add(judged)

    # Choosing

    def _choose(self, context: Context, rows: int, room: int) -> None:
        now, plain = self.clock(), self._plain_seconds(rows)
        self.budget.open(room, plain)
        horizon = min(room, max(HORIZON, self.emitted))
        self.schedule.seen(self.setup.pairs, now, plain, paid=self._rounds >= PROVEN and self._behind < 0)
        forecast = Forecast(self.chain, self.knowledge, rows)
        best, promised = self._best_known(forecast, context, horizon)
        if self._behind > max(self.budget.left, plain):
            # Whatever is predicted: plain decoding would have been quicker so far.
            self.budget.charge(self._behind)
            best, promised = PLAIN, forecast.predict(PLAIN)
        self._per_token = promised.seconds / promised.tokens
        trial = self._find_trial(forecast, context, rows, horizon, now) if horizon >= SHORTEST else None
        if trial is not None:
            self._trial = _Trial(trial)
            known = self._is_known(trial)
            self._run(trial, "trial again" if known else "trial", None)
            return
        lost = [pair for pair in self.setup.pairs if pair not in best.pairs]
        if lost:
            self.schedule.lost(lost, now, plain)
        self._settled_on = best.levels
        reason = "nothing else pays" if best == PLAIN else "quickest"
        self._run(best, reason, promised)

    def _best_known(self, forecast: Forecast, context: Context, horizon: float) -> tuple[Setup, Prediction]:
        """The quickest setup of levels whose times and acceptance are known; what runs now has an advantage."""
        plain = forecast.predict(PLAIN)
        best, promise, cost = PLAIN, plain, plain.seconds / plain.tokens * horizon
        self._turn += 1
        for turn, levels in enumerate(self._subsets[:-1]):
            planned = self._plans.get(levels)
            if planned is None or (self._turn + turn) % len(self._subsets) == 0 or levels == self.setup.levels:
                planned = self._resize(forecast, levels, planned)
            if not self._is_known(planned):
                continue
            prediction = forecast.predict(planned)
            total = prediction.seconds / prediction.tokens * horizon
            total += catch_up_seconds(self.chain, self.knowledge, context, levels)
            if levels != self._settled_on:
                total *= 1 + MARGIN
            if total < cost:
                best, promise, cost = planned, prediction, total
        return best, promise

    def _resize(self, forecast: Forecast, levels: tuple[int, ...], before: Setup | None) -> Setup:
        """The best sizes of a subset; those it had stay unless others promise clearly more."""
        found, promised = forecast.best(levels)
        if before is not None and before != found:
            kept = forecast.predict(before)
            if promised.tokens_per_second < (1 + MARGIN / 2) * kept.tokens_per_second:
                found = before
        self._plans[levels] = found
        return found

    def _find_trial(self, forecast: Forecast, context: Context, rows: int, horizon: float, now: float) -> Setup | None:
        """A setup that is due, might be quicker than the best known if all went well, and whose worst case fits into
        the budget: of those the one that promises most."""
        hoped = self._hoped(now)
        if not hoped or self.budget.left < self._needed:
            return None
        hopeful = Forecast(self.chain, self.knowledge, rows, hoped)
        self._needed, candidates = 0.0, []
        for levels in self._subsets[:-1]:
            if not hoped & set(Setup(levels, (1,) * (len(levels) - 1)).pairs):
                continue
            best, promised = hopeful.best(levels)
            behind = catch_up_seconds(self.chain, self.knowledge, context, levels)
            total = promised.seconds / promised.tokens * horizon + behind
            if total < (1 - MARGIN) * self._per_token * horizon:
                candidates.append((forecast.predict(best).tokens_per_second, levels, best))
        self._needed = float("inf") if candidates else 0.0
        for _, levels, best in sorted(candidates, key=lambda one: one[:2], reverse=True):
            chosen = self._affordable(forecast, context, rows, levels, best)
            if chosen is not None:
                self._needed = 0.0
                return chosen
        return None

    def _affordable(
        self, forecast: Forecast, context: Context, rows: int, levels: tuple[int, ...], best: Setup
    ) -> Setup | None:
        """The setup with sizes fit for a trial, if its first round cannot cost more than the budget has left."""
        self._scout(context, rows, levels)
        if not ready(self.chain, self.knowledge, levels):
            return None
        behind = catch_up_seconds(self.chain, self.knowledge, context, levels)
        for most in TRIAL_SIZES:
            setup = best.at_most(most)
            worst = forecast.predict(setup, accepted=False)
            cost = behind + worst.seconds - self._per_token
            if cost <= self.budget.left:
                return setup
        self._needed = min(self._needed, cost)
        return None

    def _scout(self, context: Context, rows: int, levels: tuple[int, ...]) -> None:
        """Time levels never run on a piece of the prompt, before anything larger is asked of them."""
        for index in levels[1:]:
            level = self.chain.levels[index]
            if self.knowledge.timed(index):
                continue
            cost = 1.5 * self.knowledge.prior_seconds(index, rows)
            if cost > self.budget.left:
                self._needed = min(self._needed, cost)
                return
            seconds = self.scout(level, context, self.knowledge.times(index), self.clock)
            self.budget.charge(seconds)
            self._planning -= seconds

    def _hoped(self, now: float) -> frozenset[Pair]:
        """Pairs that are to be tried: never tried enough, or not for a while."""
        pairs = {pair for levels in self._subsets for pair in Setup(levels, (1,) * (len(levels) - 1)).pairs}
        return frozenset(pair for pair in pairs if pair not in self.setup.pairs and self.schedule.is_due(pair, now))

    def _is_known(self, setup: Setup) -> bool:
        for upper, lower in setup.pairs:
            tree = bool(setup.tree) and lower == self.chain.last
            counts = [
                one.tried[0]
                for (u, low, size), one in self.knowledge.agreements.items()
                if (u, low) == (upper, lower) and bool(size) == tree and one.tried
            ]
            if sum(counts) < ENOUGH * 0.9:
                return False
        return ready(self.chain, self.knowledge, setup.levels)

    # Trials

    def _goes_on(self, rows: int) -> bool:
        """Whether the trial has rounds left, and the budget covers another one that brings nothing."""
        trial = self._trial
        if trial is None or trial.rounds <= 0:
            return False
        worst = Forecast(self.chain, self.knowledge, rows).predict(trial.setup, accepted=False)
        return max(0.0, trial.lost) + worst.seconds - self._per_token <= self.budget.left

    def _end_trial(self, now: float) -> None:
        if self._trial is not None:
            self.budget.charge(self._trial.lost)
            self._trial = None

    # Running

    def _run(self, setup: Setup, reason: str, promised: Prediction | None) -> None:
        """Have the chain run in this way; written down if it is a change."""
        if self._trial is not None:
            for pair in setup.pairs:
                # What was counted long ago must not outvote what the trial is to show.
                tree = setup.tree if pair[1] == self.chain.last else 0
                if pair not in self.setup.pairs:
                    self.knowledge.agreement(*pair, tree).fade(2.0)
        if self.decisions and setup == self.setup:
            return
        # The first draft after a pause reads what the level has missed.
        self._missed.update(self.chain.note(setup, self.setup if self.decisions else None, self.emitted))
        if setup.levels != self.setup.levels:
            self._behind, self._rounds = 0.0, 0
        self.chain.apply(setup)
        self.setup = setup
        speed = None if promised is None else promised.tokens_per_second
        self.decisions.append(Decision(self.emitted, setup.levels, setup.sizes, setup.tree, reason, speed))

    def _plain_seconds(self, rows: int) -> float:
        return self.knowledge.pass_seconds(0, rows)

    def _can_have_offered(self) -> bool:
        """Whether a drafter that offered nothing had what it needs: one that watches a level must have seen a pass."""
        leaf = self.chain.leaf
        return leaf is None or type(leaf).watch is Drafter.watch or leaf.stats.drafted > 0
