# SPDX-License-Identifier: Apache-2.0
"""Requests of a server, several at a time on one chain (`hf_polyspec.Engine`)."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from typing import Any

import torch

from ..engine.engine import Engine
from ..engine.request import Handle
from ..host.serving import Cancelled
from .turns import Watcher


class _Job:
    """One request: what the engine tells of it goes to the watcher and to whoever streams it.

    Args:
        watcher: is told what becomes of it.
        streamer: gets the prompt and new tokens, those of a round at once, or None.
        prompt: ids `[1, L]`; length: new tokens with which it ends at the latest.
    """

    asks_nobody = True  # nor does a server's streamer, which puts tokens in a queue

    def __init__(self, watcher: Watcher, streamer: Any, prompt: torch.Tensor, length: int | None) -> None:
        self.watcher, self.streamer, self.prompt, self.length = watcher, streamer, prompt, length
        self.asked = time.perf_counter()
        self.future: Future[list[int]] = Future()
        self.future.set_running_or_notify_cancel()
        self.handle: Handle | None = None
        self.begun = self.wrote = self.over = False
        self._lock = threading.Lock()

    def cancel(self) -> None:
        if self.handle is not None:
            self.handle.cancel()

    def began(self) -> None:
        """See `hf_polyspec.engine.request.Listener`."""
        with self._lock:  # it may be cancelled at this moment, by another thread
            if self.over:
                return
            self.begun = True
            self.watcher.runs()
        if self.streamer is not None:
            self.streamer.put(self.prompt)

    def came(self, tokens: list[int]) -> None:
        """See `hf_polyspec.engine.request.Listener`."""
        with self._lock:
            if self.over or not tokens:
                return
            if not self.wrote:
                self.watcher.first_token(time.perf_counter() - self.asked)
            self.wrote = True
        if self.streamer is not None:
            self.streamer.put(torch.tensor(tokens))

    def ended(self, handle: Future[Any]) -> None:
        """The engine has done with it."""
        assert isinstance(handle, Handle)
        with self._lock:
            self.over = True
        tokens, begun = handle.tokens, self.begun
        seconds, stats = time.perf_counter() - self.asked, handle.polyspec if begun else None
        error = Cancelled() if handle.cancelled() else handle.exception()
        if error is None:
            how = "length" if self.length is not None and len(tokens) >= self.length else "stop"
            self.watcher.ended(how, len(tokens), seconds, stats, True)
            self.future.set_result(tokens)
            if self.streamer is not None:
                with contextlib.suppress(RuntimeError):  # nobody listens any more
                    self.streamer.end()
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
        job = _Job(self.watcher, streamer, inputs["input_ids"], config.max_new_tokens)
        self.watcher.waits(inputs["input_ids"].shape[-1])
        try:
            # Whoever calls serves other clients as well, and cannot wait.
            job.handle = self._engine.submit(
                inputs["input_ids"], config, seed=seed, tokenizer=tokenizer, listener=job, timeout=0
            )
        except BaseException:
            self.watcher.ended("error", 0, 0.0, None, False)
            raise
        job.handle.add_done_callback(job.ended)
        return job

    def close(self) -> None:
        """Cancels what runs and waits, and ends the engine. Calling it twice changes nothing."""
        self._engine.close(cancel=True)
