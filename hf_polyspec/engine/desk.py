# SPDX-License-Identifier: Apache-2.0
"""Where requests wait: a bounded queue between callers' threads and the one that runs the chain."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable

from .request import Request


class QueueFullError(RuntimeError):
    """As many requests wait as an engine lets wait, and none of them has begun in the time given."""


class EngineClosedError(RuntimeError):
    """The engine takes no requests any more."""


class Desk:
    """Requests that wait, in the order in which they came.

    Args:
        queue: how many may wait.
    """

    def __init__(self, queue: int) -> None:
        self.queue = queue
        self.closed: str | None = None
        self.ending = False
        self._waiting: deque[Request] = deque()
        self._news = threading.Condition()

    def __len__(self) -> int:
        with self._news:
            return len(self._waiting)

    def check_open(self) -> None:
        """Raises an `EngineClosedError` where nothing more is taken."""
        if self.closed is not None:
            raise EngineClosedError(self.closed)

    def put(self, make: Callable[[], Request], timeout: float | None) -> Request:
        """Let a request wait, which is made once there is room for it.

        Args:
            timeout: seconds to wait for room; None for as long as it takes, 0 for none.

        Raises:
            QueueFullError: there was no room in time; EngineClosedError: the engine is closed.
        """
        until = None if timeout is None else time.monotonic() + timeout
        with self._news:
            while len(self._waiting) >= self.queue and self.closed is None:
                left = None if until is None else until - time.monotonic()
                if left is not None and left <= 0:
                    raise QueueFullError(
                        f"{self.queue} requests wait already (queue={self.queue}) and none of them began within "
                        f"{timeout} s; submit(timeout=None) waits longer."
                    )
                self._news.wait(left)
            self.check_open()
            request = make()
            self._waiting.append(request)
            self._news.notify_all()
        return request

    def take(self, fits: Callable[[Request], bool]) -> Request | None:
        """The request that has waited longest, if it fits; nobody overtakes another."""
        with self._news:
            while self._waiting and self._waiting[0].over:
                self._waiting.popleft()
            found = self._waiting.popleft() if self._waiting and fits(self._waiting[0]) else None
            self._news.notify_all()
            return found

    def wait(self) -> bool:
        """Wait for something to do; False once there will be nothing more."""
        with self._news:
            self._news.wait_for(lambda: bool(self._waiting) or self.closed is not None)
            return bool(self._waiting) and not self.ending

    def discard(self, request: Request) -> None:
        """A request was cancelled; if it waits, its place is free at once."""
        with self._news:
            if request in self._waiting:
                self._waiting.remove(request)
            self._news.notify_all()

    def close(self, why: str, *, cancel: bool) -> None:
        """Take nothing more.

        Args:
            why: what those who try are told; cancel: whether what waits and runs is given up.
        """
        with self._news:
            self.closed = self.closed or why
            self.ending = self.ending or cancel
            left = list(self._waiting) if self.ending else []
            if self.ending:
                self._waiting.clear()
            self._news.notify_all()
        for request in left:
            request.handle.cancel()

    def give_up(self, error: BaseException) -> None:
        """Nothing more is run; what waits fails."""
        with self._news:
            self.closed = self.closed or f"the engine has stopped: {error}"
            self.ending = True
            left = list(self._waiting)
            self._waiting.clear()
            self._news.notify_all()
        for request in left:
            request.handle._end_with(error=EngineClosedError(self.closed))
