# SPDX-License-Identifier: Apache-2.0
"""The outer loop: ask the target for rounds until every row is finished.

Rows accept different numbers of tokens, so they run apart. Streaming and stopping do not: a step is committed once
every row that is still going has its token for it, and then criteria and streamer see exactly what plain generation
would show them. Tokens a row has beyond a step that ends it are discarded.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from transformers import StoppingCriteriaList

from ..exactness.context import Context
from ..exactness.distributions import LawMaker
from ..exactness.judgement import Going
from ..exactness.noise import SharedNoise
from ..host.generation import EosTokenCriteria, MaxLengthCriteria, MaxTimeCriteria
from ..levels.verifier import Emission, Verifier
from ..telemetry.counters import Counted
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
class _Row:
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


class Control(Protocol):
    """Decides, between two rounds of the target, how the chain is run."""

    def before(self, context: Context, limits: list[int]) -> None:
        """A round over these rows is about to start; `limits` are the tokens each may still emit."""
        ...

    def after(self, emission: Emission) -> None:
        """The round is over."""
        ...


class DecodingLoop:
    """Runs one generation.

    Args:
        target: level 0, already begun.
        law: the target's law maker.
        stopping: when rows end.
        pad: id for the places after a row's end.
        device: where the caller's ids live.
        recorder: collects scores and the like.
        streamer: gets every step's tokens, or None.
        may_drop_rows: whether finished rows may be taken out of the batch.
        control: steers the chain, or None.
        noise: is told how many steps are final; None where there is none.
        gate: how far a pass over a row of so many columns may reach (see `host.rope`), or None.

    Attributes:
        bias: per row, the total variation that a lossy verification introduced.
    """

    def __init__(
        self,
        target: Verifier,
        law: LawMaker,
        stopping: Stopping,
        *,
        pad: int,
        device: torch.device,
        recorder: Recorder,
        streamer: Any = None,
        may_drop_rows: bool = False,
        control: Control | None = None,
        noise: SharedNoise | None = None,
        gate: Callable[[int], int | None] | None = None,
    ) -> None:
        self.target = target
        self.law = law
        self.stopping = stopping
        self.pad = pad
        self.device = device
        self.recorder = recorder
        self.streamer = streamer
        self.may_drop_rows = may_drop_rows
        self.control = control
        self.noise = noise
        self.steps = 0
        self._seen: deque[tuple[bool, list[bool]]] = deque()
        self.gate = gate
        self.bias: list[float] = []

    def run(self, context: Context) -> tuple[list[list[int]], list[list[int]]]:
        """Generate until every row is finished.

        Returns:
            Visible ids of each row, all of one length (pads after the end), and the proposing level of each new token.
        """
        rows = [_Row(list(context.visible(b))) for b in range(context.batch)]
        present = list(range(context.batch))  # rows still in the batch, by their place in it
        in_step = self.law.in_order and context.batch > 1
        first = True
        while not all(row.finished for row in rows):
            lengths = [len(ids) for ids in context.ids]
            limits = self._gated([self._limit(rows[r]) for r in present], lengths)
            # The pass that reads a prompt for others has nothing to choose, and says nothing of later ones.
            control = None if self.target.reads_for_others(context) else self.control
            if control is not None:
                control.before(context, limits)
            self.target.going = self._look_ahead(rows) if self.law.in_order else None
            emission = self.target.round(context, limits, self.law)
            if control is not None:
                control.after(emission)
            if self.recorder.wanted.any:
                self.recorder.emitted(emission, lengths, first)
            first = False
            context = context.extended(emission.tokens)
            for place, r in enumerate(present):
                self._queue(rows[r], emission.tokens[place], emission.origins[place])
                rows[r].rounds += emission.counted[place : place + 1] if emission.tokens[place] else []
                rows[r].bias += emission.bias[place] if emission.bias else 0.0
            self._commit(rows)
            if in_step:
                context = Context([_with_prompt(context, b, rows[b]) for b in range(len(rows))], context.prompt)
            elif self.may_drop_rows:
                context, present = self._drop_finished(context, rows, present)
        if self.streamer is not None:
            self.streamer.end()
        self._withdraw(rows)
        self.bias = [row.bias for row in rows]
        return [row.committed for row in rows], [row.origins for row in rows]

    def _limit(self, row: _Row) -> int:
        """Tokens the row may still emit; 0 once its end is in sight."""
        if row.ended or (row.finished and self.stopping.pads):
            return 0
        # A prompt that already fills the limit still gets one token, as in plain generation.
        return max(1, self.stopping.max_length - len(row.committed) - len(row.queue))

    def _gated(self, limits: list[int], lengths: list[int]) -> list[int]:
        """Limits with which no pass reaches across a length that it must not; rows meet before they go on beyond it."""
        going = [length for limit, length in zip(limits, lengths, strict=True) if limit]
        if self.gate is None or not going or (end := self.gate(min(going))) is None:
            return limits
        if min(going) == end:
            self.target.runner.stays = end
            return [min(limit, 1) for limit in limits]
        return [max(0, min(limit, end - length)) for limit, length in zip(limits, lengths, strict=True)]

    def _queue(self, row: _Row, tokens: list[int], origins: list[int]) -> None:
        for token, origin in zip(tokens, origins, strict=True):
            if row.ended:
                return
            row.queue.append((token, origin))
            full = len(row.committed) + len(row.queue) >= self.stopping.max_length
            row.ended = full or token in self.stopping.eos

    def _commit(self, rows: list[_Row]) -> None:
        """Make steps final while every row that is still going has a token for the next one."""
        while not all(row.finished for row in rows):
            if not all(row.queue or (row.finished and self.stopping.pads) for row in rows):
                return
            step = [self._take(row) for row in rows]
            self.steps += 1
            if self.noise is not None:
                self.noise.pass_by(self.steps)
            self.recorder.commit()
            self._finish(rows, step)
            if self.streamer is not None:
                self.streamer.put(torch.tensor(step))

    def _take(self, row: _Row) -> int:
        if row.finished and self.stopping.pads:
            row.committed.append(self.pad)
            return self.pad
        token, origin = row.queue.popleft()
        row.committed.append(token)
        row.origins.append(origin)
        return token

    def _finish(self, rows: list[_Row], step: list[int]) -> None:
        late, judged = self._seen.popleft() if self._seen else (self.stopping.out_of_time(), self._judge_others(rows))
        for b, (row, token, stop) in enumerate(zip(rows, step, judged, strict=True)):
            if row.finished:
                continue
            full = len(row.committed) >= self.stopping.max_length
            row.finished = late or stop or full or token in self.stopping.eos
            if row.finished and self.stopping.pads:
                row.behind = len(row.queue)
                row.queue.clear()
                self.recorder.drop(b)

    def _withdraw(self, rows: list[_Row]) -> None:
        """Tokens behind an end that only the loop could see, such as a stop string, count for nothing."""
        for row in rows:
            behind = row.behind + len(row.queue)
            while behind and row.rounds:
                last = row.rounds.pop()
                kept = max(0, last.emitted - behind)
                self.target.stats.withdraw(last, kept)
                behind -= last.emitted - kept

    def _look_ahead(self, rows: list[_Row]) -> Going:
        """What a round is to ask after each token where processors keep state, since they are not to be asked about
        what stands behind an end: which rows go on. Criteria are called once a token, here instead of later."""
        self._seen.clear()
        ahead: list[list[int]] = [[] for _ in rows]
        scores: list[torch.Tensor] = []
        ended = [row.finished for row in rows]

        def going(step: list[int], of_step: torch.Tensor) -> list[bool]:
            scores.append(of_step)
            for more, token in zip(ahead, step, strict=True):
                more.append(token)
            late, judged = self.stopping.out_of_time(), self._judge_others(rows, ahead, scores)
            self._seen.append((late, judged))
            for b, (row, token) in enumerate(zip(rows, step, strict=True)):
                full = len(row.committed) + len(ahead[b]) >= self.stopping.max_length
                ended[b] = ended[b] or late or judged[b] or full or token in self.stopping.eos
            # Without an id that ends a text, plain generation draws for every row until all have ended.
            return [not end for end in ended] if self.stopping.pads else [not all(ended)] * len(ended)

        return going

    def _judge_others(
        self, rows: list[_Row], ahead: Sequence[list[int]] = (), scores: Sequence[torch.Tensor] = ()
    ) -> list[bool]:
        """Criteria on every row, with tokens that are about to be committed behind it and the scores of those."""
        if not self.stopping.others:
            return [False] * len(rows)
        texts = [row.committed for row in rows]
        texts = [ids + more for ids, more in zip(texts, ahead, strict=True)] if ahead else texts
        told = (*self.recorder.scores, *scores) if self.recorder.wanted.scores else None
        done = self.stopping.others(torch.tensor(texts, device=self.device), told)
        return [bool(value) for value in done.tolist()]

    def _drop_finished(self, context: Context, rows: list[_Row], present: list[int]) -> tuple[Context, list[int]]:
        """Take rows that draw nothing more out of the batch: they would only cost time."""
        places = [place for place, r in enumerate(present) if self._limit(rows[r]) > 0]
        if len(places) == len(present) or not places:
            return context, present
        self.target.keep_rows(places)
        context = Context([context.ids[place] for place in places], context.prompt.select(places))
        return context, [present[place] for place in places]


def _with_prompt(context: Context, b: int, row: _Row) -> list[int]:
    """The row's ids with embedded positions in front, where the prompt has any."""
    hidden = len(context.ids[b]) - len(context.visible(b))
    return context.ids[b][:hidden] + list(row.committed)
