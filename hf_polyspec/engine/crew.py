# SPDX-License-Identifier: Apache-2.0
"""The one thread that runs an engine's chain: lets requests in, asks for rounds, lets them out."""

from __future__ import annotations

from typing import Any

import torch

from ..exactness.context import Context, Prompt
from ..exactness.distributions import LawMaker
from ..exactness.row_laws import RowLaws, RowNoise
from ..generation.chain import build_chain, levels_of
from ..generation.loop import DecodingLoop
from ..generation.setting import Setting
from ..host.joining import joining_runner
from ..host.moments import one_moment
from ..host.rope import gate
from ..levels.verifier import Verifier
from ..telemetry.counters import Check, LevelStats
from .desk import Desk
from .held import Held
from .request import Request
from .steering import Control, Steering

ROUNDS = 16
"""Most rounds between two looks: another thread may change the model while requests run, and some run for long."""


class Crew:
    """Runs requests of a desk over one chain, a fixed number at a time.

    Args:
        held: target and levels, released when the thread ends.
        setting: of the chain, whose `batch` is the number of seats.
        steering: makes the chain's control.
        desk: where requests wait.
        max_total_tokens: that the rows with a seat may come to hold, all together; None for any number.

    Raises:
        ValueError: the levels cannot be an engine's.
    """

    def __init__(
        self, held: Held, setting: Setting, steering: Steering, desk: Desk, max_total_tokens: int | None
    ) -> None:
        self.held = held
        self.steering = steering
        self.setting = setting
        self.desk = desk
        self.max_total_tokens = max_total_tokens
        self.noise = RowNoise(setting.device)
        self.running: list[Request] = []
        self._control: Control | None = None
        self._loop: DecodingLoop | None = self._new_loop()  # whatever is to be refused is refused now
        self.vocabulary = self._loop.target.vocabulary
        self.notes = [note for level in levels_of(self._loop.target) for note in level.stats.notes]

    def run(self) -> None:
        """Until the desk is closed and nothing is left to do."""
        try:
            with torch.no_grad():
                while self.desk.wait():
                    self._turn()
            self._leave(list(self.running), cancel=True)
        except BaseException as error:
            self.desk.give_up(error)
            for request in self.running:
                request.handle._end_with(error=error)
            if not isinstance(error, Exception):
                raise
        finally:
            self._drop_loop()
            self.held.close()

    def _turn(self) -> None:
        """Requests that fit join, and all go on until there is room again, or somebody asks for it."""
        while self.running or len(self.desk):
            if self.desk.ending:
                return
            self._admit()
            if not self.running:
                continue
            try:
                self._go_on()
            except Exception as error:
                self._fail_all(error)
                continue
            self._leave([request for request in self.running if request.over])

    def _go_on(self) -> None:
        """One round; several where no code of a caller's runs in this thread between them, nobody ends and nobody can
        join, so that what is packed is looked through once for all of them (`host.moments`)."""
        loop = self._loop
        assert loop is not None
        if not (all(request.started and request.asks_nobody for request in self.running) and loop.asks_nobody):
            loop.round()
            return
        with one_moment():
            for _ in range(ROUNDS):
                loop.round()
                joins = len(self.running) < self.setting.batch and len(self.desk)
                if joins or self.desk.ending or any(request.over for request in self.running):
                    return

    def _admit(self) -> None:
        while len(self.running) < self.setting.batch:
            request = self.desk.take(self._fits)
            if request is None:
                break
            try:
                self._seat(request)
            except Exception as error:
                request.fail(error)
                self._fail_all(error)

    def _fits(self, request: Request) -> bool:
        taken = sum(other.prepared.tokens for other in self.running)
        return self.max_total_tokens is None or taken + request.prepared.tokens <= self.max_total_tokens

    def _seat(self, request: Request) -> None:
        if self._loop is None:
            self._loop = self._new_loop()
        ids = request.prepared.ids
        self._loop.admit(request, Context([list(ids)], Prompt.apart([len(ids)], [request.place])))
        self.running.append(request)
        if request.noise is not None:
            self.noise.rows[request.place] = request.noise
        levels = levels_of(self._loop.target)
        request.begin(
            [LevelStats(level.stats.name, level.stats.index, notes=list(level.stats.notes)) for level in levels],
            self.held.chosen,
        )
        self._set_laws()
        if request.over:
            self._leave([request])

    def _leave(self, requests: list[Request], *, cancel: bool = False) -> None:
        """These have a seat no longer."""
        if not requests:
            return
        gone = {id(request) for request in requests}
        self.running = [request for request in self.running if id(request) not in gone]
        for request in requests:
            self.noise.rows.pop(request.place, None)
            if cancel:
                request.handle.cancel()
        if not self.running:
            self._drop_loop()
            return
        assert self._loop is not None
        self._loop.keep([place for place, (course, _) in enumerate(self._loop.seats) if id(course) not in gone])
        self._set_laws()

    def _fail_all(self, error: Exception) -> None:
        """A level has failed, and nobody knows what it still holds: everything that runs ends, and the next begins
        with a chain that holds nothing."""
        for request in self.running:
            request.fail(error)
            self.noise.rows.pop(request.place, None)
        self.running = []
        self._drop_loop()

    def _set_laws(self) -> None:
        assert self._loop is not None
        known: dict[Any, LawMaker] = {}
        laws = [
            request.law if request.alike is None else known.setdefault(request.alike, request.law)
            for request in self.running
        ]
        self._loop.law = RowLaws(
            laws,
            [request.place for request in self.running],
            self.setting.device,
            self.noise if self.noise.rows else None,
            keeps_scores=any(request.prepared.wanted.any for request in self.running),
        )

    def _new_loop(self) -> DecodingLoop:
        self.held.renew()
        self.steering.costs = self.held.costs
        runner = joining_runner(
            self.held.target, "the target", self.setting.device, use_cache=True, reads_embeds=True, kept=1
        )
        target = build_chain(self.held.target, self.held.levels, self.setting, runner)
        self._control = self.steering.over(target, self._observe)
        laws = RowLaws([], [], self.setting.device)
        return DecodingLoop(target, laws, control=self._control, gate=gate(self.held.target, 0))

    def _drop_loop(self) -> None:
        loop, self._loop = self._loop, None
        if loop is not None:
            if self._control is not None:
                self._control.finish()
            loop.target.end()

    def _observe(self, check: Check) -> None:
        """What a check says of single rows goes into their requests' statistics."""
        for b, request in enumerate(self.running):
            if not check.asked[b]:
                continue
            if check.level:
                _of(request, check.level).record_round(check.drafted[b], check.accepted[b])
                _of(request, check.level).forward_passes += 1
            source = None if check.source is None else _of(request, check.source)
            if source is not None and not isinstance(self._level(check.source), Verifier):
                source.drafted += check.drafted[b]
                source.accepted += check.accepted[b]

    def _level(self, index: int | None) -> Any:
        assert self._loop is not None
        return next((level for level in levels_of(self._loop.target) if level.stats.index == index), None)


def _of(request: Request, index: int) -> LevelStats:
    return next(stats for stats in request.levels if stats.index == index)
