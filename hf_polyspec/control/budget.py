# SPDX-License-Identifier: Apache-2.0
"""How much may be lost by trying out what may not pay, and when it is tried again."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from .estimates import Knowledge
from .setups import Pair

SHARE = 0.02
"""Of the time generated in, what may be lost."""
START = 0.015
"""Of the time that plain decoding would need for the first tokens, what may be lost before any was earned."""
START_TOKENS = 256
FIRST_INTERVAL = 16.0
"""Plain tokens between the first loss of a pair of levels and its next trial; doubles every time it loses again."""
LONGEST_INTERVAL = 4096.0


@dataclass
class Budget:
    """Seconds that may be lost, over the lifetime of what is known of a chain.

    A trial is charged with the seconds it took beyond those in which the best setup known would have emitted the same
    tokens; one that wins costs nothing.
    """

    knowledge: Knowledge

    def open(self, tokens: int, plain_seconds: float) -> None:
        """Grant the start-up allowance, once in the lifetime of what is known.

        Args:
            tokens: that may be generated; plain_seconds: of one plain token.
        """
        if not self.knowledge.allowance:
            self.knowledge.allowance = START * min(tokens, START_TOKENS) * plain_seconds

    @property
    def left(self) -> float:
        """Seconds that may still be lost now."""
        return self.knowledge.allowance + SHARE * self.knowledge.elapsed - self.knowledge.spent

    def charge(self, seconds: float) -> None:
        """A trial has lost this much; a gain is not paid back."""
        self.knowledge.spent += max(0.0, seconds)


@dataclass
class Schedule:
    """When each pair of levels may be tried (again).

    In `knowledge`: `due`, the time from which a pair may be tried, absent for at once; `interval`, the plain tokens it
    had to wait after its last loss.
    """

    knowledge: Knowledge

    def is_due(self, pair: Pair, now: float) -> bool:
        """Whether it is time to try a pair."""
        return now >= self.knowledge.due.get(pair, float("-inf"))

    def lost(self, pairs: Iterable[Pair], now: float, plain_seconds: float) -> None:
        """These pairs were tried, or used, and do not pay: wait twice as long as the last time."""
        for pair in pairs:
            before = self.knowledge.interval.get(pair)
            waiting = FIRST_INTERVAL if before is None else min(LONGEST_INTERVAL, 2 * before)
            self.knowledge.interval[pair] = waiting
            self.knowledge.due[pair] = now + waiting * plain_seconds

    def seen(self, pairs: Iterable[Pair], now: float, plain_seconds: float, *, paid: bool) -> None:
        """These pairs have just run: what is known of them is fresh; their losses are forgotten once they have paid."""
        for pair in pairs:
            if paid:
                self.knowledge.interval.pop(pair, None)
            fresh = now + FIRST_INTERVAL * plain_seconds
            self.knowledge.due[pair] = max(fresh, self.knowledge.due.get(pair, fresh))
