# SPDX-License-Identifier: Apache-2.0
"""Ending a long run between two steps instead of in the middle of one."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

Handler = Callable[[int, FrameType | None], Any] | int | None


class StopRequest:
    """Notices SIGTERM, SIGINT and a deadline; restores the signal handlers when left.

    Args:
        deadline: seconds since the epoch, or None.
    """

    def __init__(self, deadline: float | None = None) -> None:
        self.deadline = deadline
        self.signalled = False
        self.previous: dict[signal.Signals, Handler] = {}

    @property
    def asked(self) -> bool:
        """Whether it is time to stop."""
        return self.signalled or (self.deadline is not None and time.time() >= self.deadline)

    def __enter__(self) -> StopRequest:
        for number in (signal.SIGTERM, signal.SIGINT):
            try:
                self.previous[number] = signal.signal(number, self._notice)
            except ValueError:  # outside the main thread the program's own handlers stay
                return self
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def _notice(self, number: int, frame: FrameType | None) -> None:
        self.signalled = True
