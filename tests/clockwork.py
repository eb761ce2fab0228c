# SPDX-License-Identifier: Apache-2.0
"""Chains whose passes take time on a clock of the test, and whose drafts are right as often as the test says."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from hf_polyspec.control import OnlineControl, forget
from hf_polyspec.exactness.context import Context, Prompt, common_prefix
from hf_polyspec.exactness.distributions import LawMaker
from hf_polyspec.exactness.passes import Pass
from hf_polyspec.exactness.proposal import Proposal
from hf_polyspec.host.runner import ModelRunner
from hf_polyspec.levels.base import Drafter
from hf_polyspec.levels.verifier import Verifier

VOCABULARY = 8
LAW = LawMaker([], False, torch.device("cpu"))


class Clock:
    """Seconds that pass only when something takes time."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def truth(position: int) -> int:
    """The greedy token of the target at a position."""
    return (position * position + position // 3) % (VOCABULARY - 1)


class ClockedRunner(ModelRunner):
    """Stands for a model: `seconds(tokens)` a pass, agrees with the target at a share of the positions."""

    use_cache = True

    def __init__(
        self, clock: Clock, seconds: Callable[[int], float], agreement: Callable[[], float], size: int
    ) -> None:
        self.clock = clock
        self.seconds = seconds
        self.agreement = agreement
        self.model = nn.Linear(size, 1, bias=False)
        self.note = None
        self.memo: list[list[int]] = []
        self.dice = random.Random(size)
        self.right: dict[int, bool] = {}
        self.fed: list[int] = []
        self.lender = None

    def can_read(self, context: Context) -> bool:
        return True

    def reads_alone(self, context: Context) -> bool:
        return False

    def within(self, context: Context, limits: list[int]) -> list[int]:
        return limits

    def choice(self, position: int) -> int:
        if position not in self.right:
            self.right[position] = self.dice.random() < self.agreement()
        return truth(position) if self.right[position] else VOCABULARY - 1

    def run(self, context: Context, drafts: list[list[int]], stats: Any, *, columns: int = 0) -> Pass:
        sequences = [ids + draft for ids, draft in zip(context.ids, drafts, strict=True)]
        held = self.memo or [[] for _ in sequences]
        wanted = 1 + max(len(draft) for draft in drafts)
        fed = max(max(len(ids) - common_prefix(have, ids), wanted) for have, ids in zip(held, sequences, strict=True))
        self.memo = sequences
        self.fed.append(fed)
        stats.forward_passes += 1
        self.clock.now += self.seconds(len(sequences) * fed)
        logits = torch.zeros(len(sequences), wanted, VOCABULARY)
        for b, (ids, draft) in enumerate(zip(context.ids, drafts, strict=True)):
            for i in range(len(draft) + 1):
                logits[b, i, self.choice(len(ids) + i)] = 1.0
        return Pass(logits, None, fed, sequences)

    def keep_rows(self, rows: list[int]) -> None:
        self.memo = [self.memo[row] for row in rows]


class ClockedDrafter(Drafter):
    """Proposes `tokens` tokens, each right with the given probability, in `seconds` each."""

    name = "clocked"

    def __init__(self, clock: Clock, seconds: Callable[[], float], agreement: Callable[[], float]) -> None:
        super().__init__()
        self.clock = clock
        self.seconds = seconds
        self.agreement = agreement
        self.dice = random.Random(7)
        self.asked: list[int] = []

    def propose(self, context: Context, limits: list[int], law: LawMaker) -> Proposal:
        tokens = []
        for ids, limit in zip(context.ids, limits, strict=True):
            row = []
            for i in range(min(limit, 24)):
                right = self.dice.random() < self.agreement()
                row.append(truth(len(ids) + i) if right else VOCABULARY - 2)
            tokens.append(row)
        width = max(len(row) for row in tokens)
        self.asked.append(width)
        self.clock.now += width * self.seconds()
        return Proposal(tokens, None, [[self.index] * len(row) for row in tokens])


class OwnRows(ClockedRunner):
    """Feeds every row that is asked what it has not read, and no other columns."""

    own_rows = True

    def run(self, context: Context, drafts: list[list[int]], stats: Any, *, columns: int = 0) -> Pass:
        before, began, asked = self.memo or [[] for _ in drafts], self.clock.now, self.asked or [True] * len(drafts)
        passed = super().run(context, drafts, stats, columns=columns)
        counts = []
        for b, (have, ids, draft) in enumerate(zip(before, context.ids, drafts, strict=True)):
            whole = ids + draft
            counts.append(asked[b] * max(len(whole) - common_prefix(have, whole), 1 + len(draft)))
            self.memo[b] = whole if asked[b] else have
        self.clock.now = began + self.seconds(sum(counts))
        return replace(passed, counts=counts)


class Teller(ClockedDrafter):
    """Says how likely its tokens are, and is right about it."""

    tells_chances = True

    def propose(self, context: Context, limits: list[int], law: LawMaker) -> Proposal:
        offered = super().propose(context, [min(limit, 4) for limit in limits], law)
        chances = [[self.agreement() ** depth for depth in range(1, 1 + len(row))] for row in offered.tokens]
        return replace(offered, chances=lambda: chances)


class Run:
    """One generation on a clock.

    Args:
        clock: the time; top: the target; tokens: to emit; prompt: ids in the prompt; rows: of the batch.
        during: called before each round with the number of tokens emitted; control: makes it of top and clock.
    """

    def __init__(
        self,
        clock: Clock,
        top: Verifier,
        tokens: int = 128,
        prompt: int = 20,
        rows: int = 1,
        during: Callable[[int], None] = lambda emitted: None,
        control: Callable[..., Any] = OnlineControl,
    ) -> None:
        top.begin(0, rows, VOCABULARY)
        level: Drafter = top
        while isinstance(level, Verifier):
            level.stats.clock = clock
            level = level.below
        level.stats.clock = clock
        begun = clock.now
        self.control = control(top, clock=clock)
        ids = [truth(i) for i in range(prompt)]
        context = Context([list(ids) for _ in range(rows)], Prompt(prompt, None, torch.arange(prompt).expand(rows, -1)))
        self.log: list[tuple[float, int, tuple[int, ...]]] = []
        while any(limits := [prompt + tokens - len(row) for row in context.ids]):
            during(len(context.ids[0]) - prompt)
            self.control.before(context, limits)
            started = clock.now
            emission = top.round(context, limits, LAW)
            self.control.after(emission)
            context = context.extended(emission.tokens)
            self.log.append((clock.now - started, len(emission.tokens[0]), self.control.setup.levels))
        self.control.finish()
        self.seconds = clock.now - begun
        self.ids = context.ids
        self.text = [ids[prompt:] for ids in context.ids]


def fresh(clock: Clock) -> Clock:
    """Forget all chains."""
    forget()
    return clock
