# SPDX-License-Identifier: Apache-2.0
"""A request: what the caller holds of it, and its row on the way from prompt to end."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable, Generator, Iterator
from concurrent.futures import Future, InvalidStateError
from dataclasses import replace
from typing import Any, Protocol

import torch

from ..exactness.distributions import LawMaker
from ..exactness.kinds import SCORES_ALONE
from ..exactness.noise import SharedNoise
from ..exactness.row_laws import OneRow, RowNoise
from ..generation.chances import Chances
from ..generation.course import Course
from ..generation.outputs import Recorder
from ..host.generation import decoder_output, pad_id
from ..host.moments import is_quiet
from ..levels.emission import Emission
from ..telemetry.counters import Counted, LevelStats
from ..telemetry.stats import PolySpecStats
from .prepared import Prepared


class Handle(Future[Any]):
    """A text to come: a `concurrent.futures.Future` whose tokens can be had as they come.

    `result(timeout)` waits for what generate() would have returned for the prompt alone: ids `[1, L + T]`, or with
    `return_dict_in_generate=True` its output object with `polyspec`. `for token in handle` yields the new ids, from
    any thread; `await handle` and `async for token in handle` do the same in asyncio. `cancel()` takes the request out
    at any time; `tokens` keeps what there was by then.

    Attributes:
        seed: what a sampled text is drawn with: generate() writes it under the same `torch.manual_seed`. None where
            nothing is drawn.
        prompt_ids: ids of the prompt.
    """

    def __init__(self, prompt_ids: list[int], seed: int | None, owner: Any) -> None:
        super().__init__()
        self.seed = seed
        self.prompt_ids = prompt_ids
        self._tokens: list[int] = []
        self._news = threading.Condition()
        self._listeners: list[Callable[[], None]] = []
        self._statistics: Callable[[], PolySpecStats] | None = None
        self._owner: Any = owner  # an engine that nobody else holds lives on until its texts are there
        self.add_done_callback(_told)

    @property
    def tokens(self) -> list[int]:
        """New ids so far."""
        with self._news:
            return list(self._tokens)

    @property
    def polyspec(self) -> PolySpecStats | None:
        """What every level did for this request, so far; None while it waits."""
        return None if self._statistics is None else self._statistics()

    def __iter__(self) -> Iterator[int]:
        """New ids as they come.

        Raises:
            CancelledError: it was cancelled; otherwise what the request failed with.
        """
        at = 0
        while True:
            with self._news:
                while len(self._tokens) <= at and not self.done():
                    self._news.wait()
                more = self._tokens[at:]
            yield from more
            at += len(more)
            if not more:
                break
        self.result()

    def __await__(self) -> Generator[Any, None, Any]:
        return asyncio.wrap_future(self).__await__()

    async def __aiter__(self) -> AsyncIterator[int]:
        loop, news = asyncio.get_running_loop(), asyncio.Event()

        def listener() -> None:
            loop.call_soon_threadsafe(news.set)

        with self._news:
            self._listeners.append(listener)
        try:
            at = 0
            while True:
                news.clear()
                ended, more = self.done(), self.tokens[at:]
                for token in more:
                    yield token
                at += len(more)
                if not more and ended:
                    break
                if not more:
                    await news.wait()
            self.result()
        finally:
            with self._news:
                self._listeners.remove(listener)

    def _publish(self, tokens: list[int]) -> None:
        with self._news:
            self._tokens += tokens
            self._news.notify_all()
            listeners = list(self._listeners)
        for listener in listeners:
            try:
                listener()
            except RuntimeError:  # the event loop that listened is closed
                continue

    def _end_with(self, result: Any = None, error: BaseException | None = None) -> None:
        """The request is over, unless its caller has cancelled it meanwhile."""
        try:
            if error is None:
                self.set_result(result)
            else:
                self.set_exception(error)
        except InvalidStateError:
            return


def _told(handle: Future[Any]) -> None:
    """Whoever waits for tokens is woken: there will be no more."""
    assert isinstance(handle, Handle)
    handle._owner = None
    handle._publish([])


class Listener(Protocol):
    """Is told of one request, in the engine's thread and a round at a time; what it raises ends the request."""

    def began(self) -> None:
        """It has a slot now."""

    def came(self, tokens: list[int]) -> None:
        """These new ids are final."""


class Request(Course):
    """The one row of a request.

    Args:
        place: the row's name among all rows, see `Context.places`.
        prepared: what was asked for.
        handle: what the caller holds.
        streamer: gets the prompt and every token, or None; listener: see `Listener`, or None.
        device: of the laws; vocabulary: V of the chain.
        noise: of all rows; this one's stands there while it runs.
    """

    def __init__(
        self,
        place: int,
        prepared: Prepared,
        handle: Handle,
        streamer: Any,
        device: torch.device,
        vocabulary: int,
        noise: RowNoise,
        listener: Listener | None = None,
    ) -> None:
        self.place = place
        self.listener = listener
        self.prepared = prepared
        self.handle = handle
        self.failed = False
        self.levels: list[LevelStats] = []
        self.chosen: str | None = None
        self.started_at: float | None = None
        self.chances: Chances | None = None
        own: SharedNoise | None = None
        if prepared.config.do_sample:
            self.chances = Chances(prepared.options, device, 1, vocabulary)
            own = self.chances.noise
        recorder = Recorder(prepared.wanted, 1, len(prepared.ids), None)
        law, self.alike = self._law_maker(device, own, noise)
        pad = pad_id(prepared.config)
        super().__init__(
            [prepared.ids],
            law,
            prepared.stopping,
            pad=pad,
            device=device,
            recorder=recorder,
            streamer=streamer,
            noise=own,
        )
        handle._statistics = self.statistics

    def _law_maker(self, device: torch.device, own: SharedNoise | None, noise: RowNoise) -> tuple[LawMaker, Any]:
        """This row's law maker, and what it has in common with those that can stand for it; None for nothing."""
        processors, do_sample = self.prepared.processors, bool(self.prepared.config.do_sample)
        alike = _alike(processors) if own is not None or not do_sample else None
        chances = None if self.chances is None else self.chances.randomness
        draws_with = None if own is None else noise if alike is not None else OneRow(own)
        law = LawMaker(processors, do_sample, device, chances, draws_with, self.prepared.stopping.eos)
        return law, None if alike is None else (do_sample, alike)

    @property
    def asks_nobody(self) -> bool:
        return super().asks_nobody and (self.listener is None or is_quiet(self.listener))

    @property
    def over(self) -> bool:
        """Whether nothing more is to be done for it."""
        return self.failed or self.handle.done()

    def begin(self, levels: list[LevelStats], chosen: str | None = None) -> None:
        """It has a seat now; its statistics are kept in these, with what "auto" chose and why."""
        self.started_at = time.perf_counter()
        self.levels = levels
        self.chosen = chosen
        try:
            if self.streamer is not None:
                self.streamer.put(torch.tensor([self.prepared.ids]))
            if self.listener is not None:
                self.listener.began()
        except Exception as error:
            self.fail(error)

    def take(self, indices: Any, emission: Emission, lengths: list[int]) -> None:
        if self.over:
            return
        before = len(self.rows[0].committed)
        if emission.tokens[0]:
            # The chain counts up to the ids that end the engine's texts, and this one may have others.
            of = Counted.of(emission.drafted[0], emission.accepted[0], emission.tokens[0], self.stopping.eos)
            emission = replace(emission, counted=[of])
        self._record(emission)
        try:
            super().take(indices, emission, lengths)
        finally:
            self.handle._publish(new := self.rows[0].committed[before:])
        if self.listener is not None:
            self.listener.came(new)
        if self.finished:
            self.close(self.levels[0])
            self.handle._end_with(self._output())

    def fail(self, error: Exception) -> None:
        self.failed = True
        self.handle._end_with(error=error)

    def statistics(self) -> PolySpecStats:
        """What every level did for this request."""
        row = self.rows[0]
        seconds = 0.0 if self.started_at is None else time.perf_counter() - self.started_at
        holds = None if self.chances is None else self.chances.holds
        return PolySpecStats(
            self.levels,
            [list(row.origins)],
            len(row.origins),
            seconds,
            bias=[row.bias],
            seed_holds=holds,
            chosen=self.chosen,
        )

    def _record(self, emission: Emission) -> None:
        stats = self.levels[0]
        stats.forward_passes += 1
        for counted in emission.counted[:1]:
            stats.record_round(counted.drafted, counted.accepted, counted.drawn)
        stats.bias += sum(emission.bias)

    def _output(self) -> Any:
        sequences = torch.tensor([self.rows[0].committed], dtype=torch.long, device=self.device)
        stats = self.statistics()
        self.handle._statistics = lambda: stats
        lost = None if self.chances is None else self.chances.lost
        if lost is not None:
            stats.levels[0].notes.append(lost)
        stats.levels[0].notes += self.law.tell_left_out()
        if not self.prepared.config.return_dict_in_generate:
            return sequences
        wanted = self.prepared.wanted
        output = decoder_output(
            None,
            sequences=sequences,
            scores=self.recorder.scores if wanted.scores else None,
            logits=self.recorder.logits if wanted.logits else None,
        )
        output.polyspec = stats
        return output


def _alike(processors: Any) -> Any:
    """What rows have to have in common to share a law maker; None where processors look at ids, or are unknown.

    What is shared sees scores alone, so it cannot tell rows apart.
    """
    found = []
    for processor in processors:
        values = vars(processor)
        if type(processor) not in SCORES_ALONE or not all(isinstance(v, (int, float, str)) for v in values.values()):
            return None
        found.append((type(processor), tuple(sorted(values.items()))))
    return tuple(found)
