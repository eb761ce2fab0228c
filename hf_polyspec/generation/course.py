# SPDX-License-Identifier: Apache-2.0
"""Rows on their way from a prompt to an end: which tokens are final, and when a row has ended.

Rows accept different numbers of tokens, so they run apart. Streaming and stopping do not: a step is committed once
every row that is still going has its token for it, and then criteria and streamer see exactly what plain generation
would show them. Tokens a row has beyond a step that ends it are discarded.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import StoppingCriteriaList

from ..exactness.distributions import LawMaker
from ..exactness.id_rows import IdRows
from ..exactness.judgement import Going
from ..exactness.noise import SharedNoise
from ..host.generation import EosTokenCriteria, MaxLengthCriteria, MaxTimeCriteria
from ..host.moments import is_quiet
from ..host.ranks import ALONE, Ranks
from ..levels.emission import Emission
from ..telemetry.counters import Counted, LevelStats
from .outputs import Recorder


@dataclass(frozen=True)
class Stopping:
    """Stopping criteria, sorted by who can judge them.

    Attributes:
        max_length: visible ids at which every row stops.
        eos: ids that end a row; pads follow. Empty when no criterion looks for one.
        clocks: time limits.
        others: criteria that are called with tensors, once a token.
    """

    max_length: int
    eos: frozenset[int]
    pads: bool
    clocks: list[MaxTimeCriteria]
    others: StoppingCriteriaList

    @classmethod
    def sort(cls, criteria: StoppingCriteriaList, max_length: int) -> Stopping:
        """Recognise by exact type what the host can judge; a subclass may have a mind of its own."""
        eos: set[int] = set()
        clocks, others = [], StoppingCriteriaList()
        pads = any(hasattr(criterion, "eos_token_id") for criterion in criteria)
        for criterion in criteria:
            if type(criterion) is MaxLengthCriteria:
                max_length = min(max_length, criterion.max_length)
            elif type(criterion) is EosTokenCriteria:
                eos.update(criterion.eos_token_id.flatten().tolist())
            elif type(criterion) is MaxTimeCriteria:
                clocks.append(criterion)
            else:
                others.append(criterion)
        return cls(max_length, frozenset(eos), pads, clocks, others)

    def out_of_time(self) -> bool:
        return any(time.time() - clock.initial_timestamp > clock.max_time for clock in self.clocks)


@dataclass
class Row:
    """One row of the batch on its way."""

    committed: list[int]
    queue: deque[tuple[int, int]] = field(default_factory=deque)
    origins: list[int] = field(default_factory=list)
    finished: bool = False
    bias: float = 0.0
    rounds: list[Counted] = field(default_factory=list)
    behind: int = 0
    """Tokens that were emitted behind its end."""
    ended: bool = False
    """Its queue ends with its last token (end of text or length limit); nothing more is to be drawn."""


class Course:
    """Rows that are committed in step: those of one call of generate(), or the one of a request.

    Args:
        prompts: visible ids of each row.
        law: the target's law maker for these rows.
        stopping: when rows end.
        pad: id for the places after a row's end.
        device: where the caller's ids live.
        recorder: collects scores and the like.
        streamer: gets every step's tokens, or None.
        noise: is told how many steps are final; None where there is none.
        ranks: the processes that run these rows in step, of which the first looks at clocks and criteria.

    Attributes:
        rows: as far as they have come.
        steps: how many are final.
        started: whether anything was emitted for these rows.
    """

    def __init__(
        self,
        prompts: Sequence[Sequence[int]],
        law: LawMaker,
        stopping: Stopping,
        *,
        pad: int,
        device: torch.device,
        recorder: Recorder,
        streamer: Any = None,
        noise: SharedNoise | None = None,
        ranks: Ranks = ALONE,
    ) -> None:
        self.rows = [Row(list(ids)) for ids in prompts]
        self.law = law
        self.stopping = stopping
        self.pad = pad
        self.device = device
        self.recorder = recorder
        self.streamer = streamer
        self.noise = noise
        self.ranks = ranks
        self.steps = 0
        self.started = False
        self._seen: deque[tuple[bool, list[bool]]] = deque()
        self._texts = IdRows()

    @property
    def finished(self) -> bool:
        """Whether all rows have ended."""
        return all(row.finished for row in self.rows)

    @property
    def asks_nobody(self) -> bool:
        """Whether no code of the caller's is told of steps."""
        told = [*self.stopping.others, *([] if self.streamer is None else [self.streamer])]
        return all(map(is_quiet, told))

    def limit(self, index: int) -> int:
        """Tokens the row may still emit; 0 once its end is in sight."""
        row = self.rows[index]
        if row.ended or (row.finished and self.stopping.pads):
            return 0
        # A prompt that already fills the limit still gets one token, as in plain generation.
        return max(1, self.stopping.max_length - len(row.committed) - len(row.queue))

    def take(self, indices: Sequence[int], emission: Emission, lengths: list[int]) -> None:
        """A round of the target is over.

        Args:
            indices: which of the rows were in it; emission: of these rows alone.
            lengths: ids of each of them before the round.
        """
        if self.recorder.wanted.any:
            self.recorder.emitted(emission, lengths, not self.started)
        self.started = True
        for place, index in enumerate(indices):
            row = self.rows[index]
            self._queue(row, emission.tokens[place], emission.origins[place])
            row.rounds += emission.counted[place : place + 1] if emission.tokens[place] else []
            row.bias += emission.bias[place] if emission.bias else 0.0
        self._commit()

    def close(self, stats: LevelStats) -> None:
        """All rows have ended.

        Args:
            stats: of the target, for these rows: tokens behind an end count for nothing.
        """
        if self.streamer is not None:
            self.streamer.end()
        self._withdraw(stats)

    def fail(self, error: Exception) -> None:
        """Something that belongs to these rows alone has failed: a streamer, a criterion, a processor."""
        raise error

    def look_ahead(self) -> Going:
        """What a round is to ask after each token where processors keep state, since they are not to be asked about
        what stands behind an end: which rows go on. Criteria are called once a token, here instead of later."""
        rows = self.rows
        self._seen.clear()
        ahead: list[list[int]] = [[] for _ in rows]
        scores: list[torch.Tensor] = []
        ended = [row.finished for row in rows]

        def going(step: list[int], of_step: torch.Tensor) -> list[bool]:
            scores.append(of_step)
            for more, token in zip(ahead, step, strict=True):
                more.append(token)
            late, judged = self._judged(ahead, scores)
            self._seen.append((late, judged))
            for b, (row, token) in enumerate(zip(rows, step, strict=True)):
                full = len(row.committed) + len(ahead[b]) >= self.stopping.max_length
                ended[b] = ended[b] or late or judged[b] or full or token in self.stopping.eos
            # Without an id that ends a text, plain generation draws for every row until all have ended.
            return [not end for end in ended] if self.stopping.pads else [not all(ended)] * len(ended)

        return going

    def _queue(self, row: Row, tokens: list[int], origins: list[int]) -> None:
        for token, origin in zip(tokens, origins, strict=True):
            if row.ended:
                return
            row.queue.append((token, origin))
            full = len(row.committed) + len(row.queue) >= self.stopping.max_length
            row.ended = full or token in self.stopping.eos

    def _commit(self) -> None:
        """Make steps final while every row that is still going has a token for the next one."""
        rows = self.rows
        while not self.finished:
            if not all(row.queue or (row.finished and self.stopping.pads) for row in rows):
                return
            step = [self._next(row) for row in rows]
            self.steps += 1
            if self.noise is not None:
                self.noise.pass_by(self.steps)
            self.recorder.commit()
            self._finish(step)
            if self.streamer is not None:
                self.streamer.put(torch.tensor(step))

    def _next(self, row: Row) -> int:
        if row.finished and self.stopping.pads:
            row.committed.append(self.pad)
            return self.pad
        token, origin = row.queue.popleft()
        row.committed.append(token)
        row.origins.append(origin)
        return token

    def _finish(self, step: list[int]) -> None:
        late, judged = self._seen.popleft() if self._seen else self._judged()
        for b, (row, token, stop) in enumerate(zip(self.rows, step, judged, strict=True)):
            if row.finished:
                continue
            full = len(row.committed) >= self.stopping.max_length
            row.finished = late or stop or full or token in self.stopping.eos
            if row.finished and self.stopping.pads:
                row.behind = len(row.queue)
                row.queue.clear()
                self.recorder.drop(b)

    def _withdraw(self, stats: LevelStats) -> None:
        """Tokens behind an end that only the loop could see, such as a stop string, count for nothing."""
        for row in self.rows:
            behind = row.behind + len(row.queue)
            while behind and row.rounds:
                last = row.rounds.pop()
                kept = max(0, last.emitted - behind)
                stats.withdraw(last, kept)
                behind -= last.emitted - kept

    def _judged(self, ahead: Sequence[list[int]] = (), scores: Sequence[torch.Tensor] = ()) -> tuple[bool, list[bool]]:
        """Whether time is up, and which rows criteria want to end."""
        late, judged = self.stopping.out_of_time(), self._judge_others(ahead, scores)
        if self.ranks.in_step and (self.stopping.clocks or self.stopping.others):
            first, *others = self.ranks.first([late, *judged])
            late, judged = bool(first), [bool(one) for one in others]
        return late, judged

    def _judge_others(self, ahead: Sequence[list[int]] = (), scores: Sequence[torch.Tensor] = ()) -> list[bool]:
        """Criteria on every row, with tokens that are about to be committed behind it and the scores of those."""
        rows = self.rows
        if not self.stopping.others:
            return [False] * len(rows)
        texts = [row.committed for row in rows]
        texts = [ids + more for ids, more in zip(texts, ahead or [[]] * len(rows), strict=True)]
        told = (*self.recorder.scores, *scores) if self.recorder.wanted.scores else None
        # A copy of what is kept: a criterion may keep what it is given.
        done = self.stopping.others(self._texts.of(texts, self.device).clone(), told)
        return [bool(value) for value in done.tolist()]
