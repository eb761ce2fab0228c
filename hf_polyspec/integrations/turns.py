# SPDX-License-Identifier: Apache-2.0
"""Requests of a server, one after the other."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from typing import Any, Protocol

import torch

from ..generation.doors import generate
from ..host.generation import BaseStreamer
from ..host.serving import Cancelled


class Watcher(Protocol):
    """Is told what becomes of requests."""

    def waits(self, prompt_tokens: int) -> None:
        """One has come."""

    def runs(self) -> None:
        """One that waited has begun."""

    def first_token(self, seconds: float) -> None:
        """One's first token is there, so long after it came."""

    def ended(self, how: str, new_tokens: int, seconds: float, stats: Any, begun: bool) -> None:
        """One is over: stop, length, abort or error; `begun` says whether it ever ran."""


class _Job:
    def __init__(self, arguments: dict[str, Any], streamer: Any) -> None:
        self.arguments = arguments
        self.streamer = streamer
        self.came = time.perf_counter()
        self.future: Future[list[int]] = Future()
        self.gone = threading.Event()

    def cancel(self) -> None:
        self.gone.set()


class _Listener(BaseStreamer):
    """Hands tokens on, and ends a generation nobody waits for."""

    def __init__(self, job: _Job, watcher: Watcher, closing: threading.Event) -> None:
        self.job, self.watcher, self.closing = job, watcher, closing
        self.told = -1  # the first thing that is put is the prompt

    def put(self, value: torch.Tensor) -> None:
        if self.job.gone.is_set() or self.closing.is_set():
            raise Cancelled
        self.told += 1
        if self.told == 1:
            self.watcher.first_token(time.perf_counter() - self.job.came)
        if self.job.streamer is not None:
            self.job.streamer.put(value)

    def end(self) -> None:
        if self.job.streamer is not None:
            self.job.streamer.end()


class Turns:
    """Generates requests one after the other, in the order in which they came, on a thread of its own.

    Args:
        model: the target; assistants: its chain.
        options: of `generate()`, the same for every request.
        watcher: is told what becomes of them.
    """

    def __init__(self, model: Any, assistants: Sequence[Any], options: Mapping[str, Any], watcher: Watcher) -> None:
        self.model, self.assistants, self.options = model, list(assistants), dict(options)
        self.watcher = watcher
        self._closing = threading.Event()
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="polyspec-generate", daemon=True)
        self._thread.start()

    def submit(self, inputs: dict[str, Any], config: Any, seed: int | None, tokenizer: Any, streamer: Any) -> _Job:
        """Queues a request; see `hf_polyspec.host.serving.Work`."""
        config.return_dict_in_generate = True
        for name, value in (self.options | {"polyspec_seed": seed}).items():
            setattr(config, name, value)
        job = _Job({**inputs, "generation_config": config, "tokenizer": tokenizer}, streamer)
        self.watcher.waits(inputs["input_ids"].shape[-1])
        self._jobs.put(job)
        return job

    def close(self) -> None:
        """Cancels what runs and waits, and ends the thread. Calling it twice changes nothing."""
        self._closing.set()
        self._jobs.put(None)
        self._thread.join()

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            self._answer(job)
            del job  # not held while the next one is waited for

    def _answer(self, job: _Job) -> None:
        """Generates one; whatever happens, its future is settled and the watcher told before that."""
        # What waits for a future may cancel it, until this line.
        wanted = job.future.set_running_or_notify_cancel()
        if not wanted or job.gone.is_set() or self._closing.is_set():
            self.watcher.ended("abort", 0, 0.0, None, False)
            if wanted:
                job.future.set_exception(Cancelled())
            return
        self.watcher.runs()
        listener = _Listener(job, self.watcher, self._closing)
        try:
            ids, stats = self._generate(job, listener)
        except BaseException as error:
            how = "abort" if isinstance(error, Cancelled) else "error"
            self.watcher.ended(how, max(0, listener.told), time.perf_counter() - job.came, None, True)
            # Its frames hold tensors, and whoever waits needs none of them.
            job.future.set_exception(error.with_traceback(None))
            return
        length = job.arguments["generation_config"].max_new_tokens
        how = "length" if length is not None and len(ids) >= length else "stop"
        self.watcher.ended(how, len(ids), time.perf_counter() - job.came, stats, True)
        job.future.set_result(ids)

    def _generate(self, job: _Job, listener: _Listener) -> tuple[list[int], Any]:
        answer = generate(
            self.model,
            assistant_models=self.assistants,
            streamer=listener,
            **job.arguments,
        )
        prompt = job.arguments["input_ids"].shape[-1]
        return answer.sequences[0, prompt:].tolist(), getattr(answer, "polyspec", None)
