# SPDX-License-Identifier: Apache-2.0
"""What a generation has won and lost against the target alone, and what it may therefore lose next."""

from __future__ import annotations

from dataclasses import dataclass

START = 0.7
"""Plain tokens that a generation may be behind at first: 4.4 % of an answer of 16."""
TRUSTED, OF_ROOM = 1.5, 0.023
"""The same where what is tried was right in the answers before: so many, or this share of the tokens that an answer may
have, whichever is less."""
CREDIT = 0.5
"""Plain tokens that a setup may lose at first."""
SHARE = 0.02
"""Of the time generated in, what may be lost besides."""
FADES = 0.8
"""What a round leaves of the seconds before it."""


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

    def left(self, plain: float, start: float = START) -> float:
        """What the next round may lose: nobody asked for a trial, so an answer is never far behind.

        Args:
            plain: seconds of a plain token; start: plain tokens that the generation may be behind at first.
        """
        return max(start * plain, SHARE * self.elapsed) + self.won


@dataclass
class Account:
    """What the setup that runs has won and lost, in seconds.

    Attributes:
        balance: never more than one round may lose: what was won on one text is not for losing on another.
        credit: that it may lose; rounds: it ran; most: tokens it may hand up at once, None for as many as pay.
        missed: whether its levels may have to read, in its first round, what they have missed.
        total: won and lost in all.
        share: of the time it runs, what may be lost besides.
    """

    credit: float
    balance: float = 0.0
    rounds: int = 0
    most: int | None = None
    missed: bool = False
    total: float = 0.0
    share: float = SHARE
    _seconds: float = 0.0
    _idle: float = 0.0

    def book(self, gain: float, seconds: float, tokens: float) -> None:
        """A round that took so long and emitted so many tokens has won or lost against the target alone."""
        self.rounds += 1
        self.total += gain
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
        return self.balance < -self.credit
