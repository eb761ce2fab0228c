# SPDX-License-Identifier: Apache-2.0
"""What a generation has won and lost against the target alone, and what it may therefore lose next."""

from __future__ import annotations

from dataclasses import dataclass

START = 0.7
"""Plain tokens that a generation may be behind at first: 4.4 % of an answer of 16."""
TRUSTED, OF_ROOM = 1.5, 0.018
"""The same where what is tried was right in the answers before: so many, or this share of the tokens that an answer may
have, whichever is less."""
SURELY, LEAST_SURELY, SURELY_OF_ROOM, NEEDED = 1.2, 0.05, 0.0095, 24
"""The same that may be lost besides to drafts that say themselves how likely they are; next to nothing of answers of so
many tokens, which have nothing to spare."""
CREDIT = 0.5
"""Plain tokens that a setup may lose at first."""
RISE, MOST = 0.042, 1.25
"""Of the time generated in, what may be lost early on, up to so many plain tokens: 4.4 % of an answer of 16 are allowed
behind its 16th token too, and 2.5 % of 64."""
SHARE = 0.02
"""Of the time generated in, what may be lost besides."""
FADES = 0.8
"""What a round leaves of the seconds before it."""

FIRST_WAIT = 12.0
"""Tokens after which what had paid until now is tried again: two unlucky rounds are no change of the text."""
SHORTEST_WAIT = 24.0
LONGEST_WAIT = 1024.0
UNSEEN_WAIT = 96.0
"""The shortest where nothing was lost, since what was known promised nothing: a middle that is tried reads the text."""


def at_first(room: int) -> tuple[float, float]:
    """Plain tokens that an answer of so many at most may be behind at first, where what is tried was right in the
    answers before, and besides for drafts that say themselves how likely they are."""
    surely = min(SURELY, SURELY_OF_ROOM * room) if room > NEEDED else LEAST_SURELY
    return max(START, min(TRUSTED, OF_ROOM * room)), surely


@dataclass
class Ledger:
    """One generation, in seconds.

    Attributes:
        won: against the target alone, in all rounds together; below 0 the generation is behind.
        elapsed: in them.
    """

    won: float = 0.0
    elapsed: float = 0.0

    def book(self, gain: float, seconds: float) -> None:
        """A round that took so long has won or lost."""
        self.won += gain
        self.elapsed += seconds

    def left(self, plain: float, start: float = START, besides: float = 0.0) -> float:
        """What the next round may lose: nobody asked for a trial, so an answer is never far behind.

        Args:
            plain: seconds of a plain token; start: plain tokens that the generation may be behind at first.
            besides: plain tokens that it may be behind in any case.
        """
        early = min(RISE * self.elapsed, MOST * plain)
        return max(start * plain, early, SHARE * self.elapsed) + besides * plain + self.won


@dataclass
class Account:
    """What the setup that runs has won and lost, in seconds.

    Attributes:
        balance: never more than one round may lose: what was won on one text is not for losing on another.
        credit: that it may lose; rounds: it ran; most: tokens it may hand up at once, None for as many as pay.
        missed: whether its levels may have to read, in its first round, what they have missed.
        total: won and lost in all.
        share: of the time it runs, what may be lost besides.
        patience: rounds in a row that must have lost before it counts as overdrawn; lost: how many have.
    """

    credit: float
    balance: float = 0.0
    rounds: int = 0
    most: int | None = None
    missed: bool = False
    total: float = 0.0
    share: float = SHARE
    patience: int = 1
    lost: int = 0
    _seconds: float = 0.0
    _idle: float = 0.0

    def book(self, gain: float, seconds: float, tokens: float) -> None:
        """A round that took so long and emitted so many tokens has won or lost against the target alone."""
        self.rounds += 1
        self.total += gain
        self.lost = self.lost + 1 if gain < 0 else 0
        self._seconds = FADES * self._seconds + seconds
        self._idle = FADES * self._idle + (seconds if tokens <= 1 else 0.0)
        gain += self.share * seconds
        if self.missed and self.rounds == 1:  # what is read once says nothing of the rounds to come
            gain = max(gain, 0.0)
        self.balance = min(max(self.credit, seconds), self.balance + gain)

    @property
    def idle(self) -> float:
        """Share of the time, of late, that rounds took which emitted one token; 1 before the first round."""
        return self._idle / self._seconds if self._seconds else 1.0

    @property
    def overdrawn(self) -> bool:
        return self.balance < -self.credit and self.lost >= self.patience


def wait_after(account: Account, plain: float, before: float, several: bool, believed: bool) -> float:
    """Plain tokens after which a setup that is left now is tried again.

    Args:
        account: of the setup; plain: seconds of a plain token; before: what it had to wait the last time.
        several: whether there are several rows.
        believed: whether more is known of its middle than how its last rounds went.
    """
    proven = account.most is None
    if not account.overdrawn:
        return SHORTEST_WAIT if believed else max(UNSEEN_WAIT, 2 * before if several else 0.0)
    least = FIRST_WAIT if proven else SHORTEST_WAIT
    # So long that what was lost is only a share of the time; less at first where a middle is believed.
    wait = max(least, 0.0 if proven else -account.total / plain / account.share)
    if several:
        wait = max(wait, 2 * before)
    elif believed:
        wait = min(wait, max(FIRST_WAIT, 2 * before))
    return min(LONGEST_WAIT, wait)
