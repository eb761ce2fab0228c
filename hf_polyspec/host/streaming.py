# SPDX-License-Identifier: Apache-2.0
"""What comes of a stream, on its way from the thread that runs the models to the event loop that sends it."""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import Callable
from typing import Any

_ROUND = 0.002
"""Seconds in which the tokens of one round come, of which there are two to ten."""
_PACE = 0.05
"""Seconds between two events of a stream that is quicker than that."""


class Gathered:
    """Calls of an event loop from another thread, of which those that come at once wake it once.

    A round of a chain gives several tokens. Waking the loop for each of them has its thread ask for the interpreter as
    often, while the next round wants it, and has each of them travel to the client by itself. For the same reason a
    stream that is quick sends what several rounds gave, every `_PACE`; its first text and its end wait for nothing.

    Args:
        loop: the event loop.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._waiting: deque[tuple[Callable[..., Any], tuple[Any, ...]]] = deque()
        self._lock = threading.Lock()
        self._woken = False
        self._called = -_PACE  # when calls were made last

    def is_closed(self) -> bool:
        """Whether nobody will be called any more."""
        return self._loop.is_closed()

    def call_soon_threadsafe(self, call: Callable[..., Any], *args: Any, last: bool = False) -> None:
        """The loop calls it, after what was asked before; at once where it is the last of a stream.

        Raises:
            RuntimeError: the loop is closed.
        """
        with self._lock:
            self._waiting.append((call, args))
            if self._woken and not last:
                return
            self._woken = True
        try:
            self._loop.call_soon_threadsafe(self._call if last else self._gather)
        except RuntimeError:
            self._woken = False
            raise

    def _gather(self) -> None:
        self._loop.call_later(max(_ROUND, self._called + _PACE - self._loop.time()), self._call)

    def _call(self) -> None:
        with self._lock:
            calls, self._woken = list(self._waiting), False
            self._waiting.clear()
        self._called = self._loop.time()
        for call, args in calls:
            call(*args)


class ThisThread:
    """Stands for the event loop where its own thread calls."""

    @staticmethod
    def call_soon_threadsafe(call: Callable[..., Any], *args: Any) -> None:
        call(*args)


class Texts(asyncio.Queue[Any]):
    """What a stream is to send, in which a text that still waits takes in the one that follows it.

    A client gets what a round has given in one event. Each event is a model of its own, built, checked and written by
    the web server and read by the client, which costs more than the tokens in it.
    """

    def _put(self, item: Any) -> None:
        """asyncio's hook for queues of another kind."""
        kept: deque[Any] = self._queue  # type: ignore[attr-defined]
        # Of the same kind: what a model thinks goes where its answer does not.
        if kept and isinstance(item, str) and type(kept[-1]) is type(item):
            kept[-1] = type(item)(kept[-1] + item)
        else:
            super()._put(item)
