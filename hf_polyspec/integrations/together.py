# SPDX-License-Identifier: Apache-2.0
"""Requests of a server, several at a time on one chain (`hf_polyspec.Engine`)."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from typing import Any

import torch

from ..engine.engine import Engine
from ..engine.request import Handle
from ..host.generation import BaseStreamer
from ..host.serving import Cancelled
from .turns import Watcher


class _Job(BaseStreamer):
    """One request: what the engine tells of it goes to the watcher and to whoever streams it.

    Args:
        watcher: is told what becomes of it.
        streamer: gets the prompt and new tokens, or None.
        length: new tokens with which it ends at the latest.
    """

    def __init__(self, watcher: Watcher, streamer: Any, length: int | None) -> None:
        self.watcher, self.streamer, self.length = watcher, streamer, length
        self.came = time.perf_counter()
        self.future: Future[list[int]] = Future()
        self.future.set_running_or_notify_cancel()
        self.handle: Handle | None = None
        self.told = -1  # the first thing that is put is the prompt
        self.over = False
        self._lock = threading.Lock()

    def cancel(self) -> None:
        if self.handle is not None:
            self.handle.cancel()

    def put(self, value: torch.Tensor) -> None:
        with self._lock:  # it may be cancelled at this moment, by another thread
            if self.over:
                return
            self.told += 1
            if self.told == 0:
                self.watcher.runs()
            if self.told == 1:
                self.watcher.first_token(time.perf_counter() - self.came)
        if self.streamer is not None:
            self.streamer.put(value)

    def end(self) -> None:
        if self.streamer is not None:
            self.streamer.end()

    def ended(self, handle: Future[Any]) -> None:
        """The engine has done with it."""
        assert isinstance(handle, Handle)
        with self._lock:
            self.over = True
        tokens, begun = handle.tokens, self.told >= 0
        seconds, stats = time.perf_counter() - self.came, handle.polyspec if begun else None
        error = Cancelled() if handle.cancelled() else handle.exception()
        if error is None:
            how = "length" if self.length is not None and len(tokens) >= self.length else "stop"
            self.watcher.ended(how, len(tokens), seconds, stats, True)
            self.future.set_result(tokens)
            return
        self.watcher.ended("abort" if isinstance(error, Cancelled) else "error", len(tokens), seconds, stats, begun)
        self.future.set_exception(error.with_traceback(None))


class Together:
    """Generates requests of which several run at once, in the rows of one batch that they join and leave.

    Args:
        model: the target; assistants: its chain.
        options: of the chain.
        watcher: is told what becomes of requests.
        slots: how many run at a time; queue: how many may wait.

    Raises:
        TypeError, ValueError: the chain cannot work, or not for rows that join.
    """

    def __init__(
        self,
        model: Any,
        assistants: Sequence[Any],
        options: Mapping[str, Any],
        watcher: Watcher,
        *,
        slots: int,
        queue: int = 1024,
    ) -> None:
        self.watcher = watcher
        self._engine = Engine(model, list(assistants), slots=slots, queue=queue, **options)

    def submit(self, inputs: dict[str, Any], config: Any, seed: int | None, tokenizer: Any, streamer: Any) -> _Job:
        """Queues a request; see `hf_polyspec.host.serving.Work`.

        Raises:
            TypeError, ValueError: it cannot be served; QueueFullError: too many wait.
        """
        job = _Job(self.watcher, streamer, config.max_new_tokens)
        self.watcher.waits(inputs["input_ids"].shape[-1])
        try:
            # Whoever calls serves other clients as well, and cannot wait.
            job.handle = self._engine.submit(
                inputs["input_ids"], config, seed=seed, tokenizer=tokenizer, streamer=job, timeout=0
            )
        except BaseException:
            self.watcher.ended("error", 0, 0.0, None, False)
            raise
        job.handle.add_done_callback(job.ended)
        return job

    def close(self) -> None:
        """Cancels what runs and waits, and ends the engine. Calling it twice changes nothing."""
        self._engine.close(cancel=True)
