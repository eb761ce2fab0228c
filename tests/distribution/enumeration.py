# SPDX-License-Identifier: Apache-2.0
"""Exact enumeration: the real levels, run over every outcome of every coin.

A `Replay` takes the place of the random generator and follows a prescribed list of outcomes; `outcomes` runs a program
again and again until every list has been followed, and adds up their probabilities. Laws are computed in float64, so
sums are exact to about 1e-15.

Blocks, rounds and drafts are functions of the context alone (a cache is only a memo), so their outcome tables are
computed once a context and then drawn from as one choice: `OneChoice` and `OneChoiceRounds`. Nothing of the level's own
code is replaced by that.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import LogitsProcessor

from hf_polyspec.exactness.context import Context, Prompt
from hf_polyspec.exactness.distributions import LawMaker
from hf_polyspec.exactness.passes import Pass
from hf_polyspec.exactness.proposal import Proposal
from hf_polyspec.levels.base import Drafter
from hf_polyspec.levels.emission import Emission
from hf_polyspec.levels.verifier import Verifier

CPU = torch.device("cpu")
EXACT = 1e-9
START = (0,)


class Replay:
    """A source of randomness that follows `script` and takes the first possible outcome beyond its end."""

    def __init__(self, script: list[int]) -> None:
        self.script = script
        self.taken: list[int] = []
        self.alternatives: list[list[int]] = []
        self.weight = 1.0

    def bernoulli(self, probability: torch.Tensor) -> torch.Tensor:
        flat = probability.flatten().tolist()
        joint = []
        for coins in itertools.product((False, True), repeat=len(flat)):
            weight = 1.0
            for coin, p in zip(coins, flat, strict=True):
                weight *= p if coin else 1 - p
            joint.append(weight)
        chosen = self._choose(joint)
        coins = list(itertools.product((False, True), repeat=len(flat)))[chosen]
        return torch.tensor(coins, dtype=torch.bool).reshape(probability.shape)

    def categorical(self, weights: torch.Tensor) -> torch.Tensor:
        normal = weights / weights.sum(-1, keepdim=True)
        rows = [row.tolist() for row in normal]
        picks = list(itertools.product(*(range(len(row)) for row in rows)))
        joint = []
        for pick in picks:
            weight = 1.0
            for row, index in zip(rows, pick, strict=True):
                weight *= row[index]
            joint.append(weight)
        return torch.tensor(picks[self._choose(joint)])

    def _choose(self, weights: list[float]) -> int:
        possible = [i for i, weight in enumerate(weights) if weight > 0]
        at = len(self.taken)
        if at < len(self.script):
            choice = self.script[at]
            self.alternatives.append([])
        else:
            choice = possible[0]
            self.alternatives.append(possible[1:])
        self.taken.append(choice)
        self.weight *= weights[choice]
        return choice


def outcomes(program: Callable[[Replay], tuple[Any, Any]]) -> dict[Any, tuple[float, Any]]:
    """All results of a program with their probabilities.

    Args:
        program: run with a source of randomness, returns (key, value); results of equal key are one outcome.

    Returns:
        key -> (probability, value).
    """
    found: dict[Any, tuple[float, Any]] = {}
    scripts: list[list[int]] = [[]]
    while scripts:
        replay = Replay(scripts.pop())
        key, value = program(replay)
        found[key] = (found.get(key, (0.0, None))[0] + replay.weight, value)
        for at in range(len(replay.script), len(replay.taken)):
            scripts.extend([*replay.taken[:at], other] for other in replay.alternatives[at])
    return found


class TableModel:
    """A "model" whose law at every prefix is an independent random one; stands in for a `ModelRunner`."""

    model = torch.nn.Identity().eval()
    note = None

    def __init__(self, vocabulary: int, seed: int, like: TableModel | None = None, distance: float = 1.0) -> None:
        self.vocabulary = vocabulary
        self.seed = seed
        self.like = like
        self.distance = distance
        self._known: dict[tuple[int, ...], torch.Tensor] = {}

    def logits(self, prefix: tuple[int, ...]) -> torch.Tensor:
        if prefix not in self._known:
            number = self.seed
            for token in prefix:
                number = (number * 1_000_003 + token + 1) % (2**31 - 1)
            own = torch.randn(self.vocabulary, generator=torch.Generator().manual_seed(number), dtype=torch.float64)
            base = self.like.logits(prefix) if self.like is not None else 0.0
            self._known[prefix] = base + self.distance * own
        return self._known[prefix]

    def law(self, prefix: tuple[int, ...]) -> torch.Tensor:
        return self.logits(prefix).softmax(-1)

    def can_read(self, context: Context) -> bool:
        return True

    def reads_alone(self, context: Context) -> bool:
        return False

    def within(self, context: Context, limits: list[int]) -> list[int]:
        return limits

    def run(self, context: Context, drafts: list[list[int]], stats: Any) -> Pass:
        width = 1 + max(len(draft) for draft in drafts)
        logits = torch.zeros(len(drafts), width, self.vocabulary, dtype=torch.float64)
        for b, draft in enumerate(drafts):
            for i in range(len(draft) + 1):
                logits[b, i] = self.logits(tuple(context.ids[b] + draft[:i]))
        return Pass(logits, None, width)


def approximations(count: int, vocabulary: int, seed: int, kind: type[TableModel] = TableModel) -> list[Any]:
    """A target and ever more distant approximations of it."""
    found = [kind(vocabulary, seed)]
    while len(found) < count:
        found.append(kind(vocabulary, seed + 100 * len(found), like=found[-1], distance=0.8))
    return found


def sampling(*processors: LogitsProcessor) -> LawMaker:
    return LawMaker(list(processors), True, CPU)


def context_of(*rows: tuple[int, ...]) -> Context:
    return Context([list(row) for row in rows], Prompt(1, None, torch.zeros(len(rows), 1, dtype=torch.long)))


def _choose(law: LawMaker, table: dict[Any, tuple[float, Any]]) -> Any:
    weights = torch.tensor([[probability for probability, _ in table.values()]], dtype=torch.float64)
    return list(table.values())[int(law.draw(weights)[0])][1]


def _with(law: LawMaker, replay: Replay) -> LawMaker:
    return LawMaker(law.processors, law.do_sample, law.device, replay)


class Opaque(LogitsProcessor):
    """Does nothing, but the library cannot know: forces judging position by position."""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return scores


class FixedDrafter(Drafter):
    """Proposes what it did not draw: the same two tokens always after texts of one length, q=None."""

    def propose(self, context: Context, limits: list[int], law: LawMaker) -> Proposal:
        tokens = [
            [(len(ids) + i) % 2 for i in range(min(2, limit))] for ids, limit in zip(context.ids, limits, strict=True)
        ]
        return Proposal(tokens, None, [[self.index] * len(row) for row in tokens])


class OneChoice(Drafter):
    """A level whose whole proposal is drawn in one choice, from the table of what the real level would do."""

    def __init__(self, level: Drafter) -> None:
        super().__init__()
        self.level = level
        self._tables: dict[Any, dict[Any, tuple[float, Any]]] = {}

    def begin(self, index: int, batch: int, vocabulary: int) -> None:
        super().begin(index, batch, vocabulary)
        self.level.begin(index, batch, vocabulary)

    def propose(self, context: Context, limits: list[int], law: LawMaker) -> Proposal:
        key = (tuple(map(tuple, context.ids)), tuple(limits))
        if key not in self._tables:

            def program(replay: Replay) -> tuple[Any, Any]:
                proposal = self.level.propose(context, limits, _with(law, replay))
                laws = None if proposal.q is None else tuple(proposal.q.flatten().tolist())
                return (tuple(map(tuple, proposal.tokens)), laws), proposal

            self._tables[key] = outcomes(program)
        return _choose(law, self._tables[key])


class OneChoiceRounds(Verifier):
    """A verifier whose rounds are drawn in one choice each, from the table of what the real round would do."""

    def round(self, context: Context, limits: list[int], law: LawMaker) -> Emission:
        if not hasattr(self, "_rounds"):
            self._rounds: dict[Any, dict[Any, tuple[float, Any]]] = {}
        key = (tuple(map(tuple, context.ids)), tuple(limits))
        if key not in self._rounds:

            def program(replay: Replay) -> tuple[Any, Any]:
                emission = super(OneChoiceRounds, self).round(context, limits, _with(law, replay))
                return tuple(map(tuple, emission.tokens)), emission

            self._rounds[key] = outcomes(program)
        return _choose(law, self._rounds[key])


def emitted_law(target: Verifier, law: LawMaker, start: tuple[int, ...], length: int) -> dict[tuple[int, ...], float]:
    """The law of the first `length` tokens that the target emits, by running its rounds over all outcomes."""
    done: dict[tuple[int, ...], float] = {}
    open_: dict[tuple[int, ...], float] = {(): 1.0}
    while open_:
        following: dict[tuple[int, ...], float] = {}
        for tokens, weight in open_.items():
            context = context_of(start + tokens)

            def program(replay: Replay, context: Context = context, have: int = len(tokens)) -> tuple[Any, Any]:
                emission = target.round(context, [length - have], _with(law, replay))
                return tuple(emission.tokens[0]), None

            for more, (probability, _) in outcomes(program).items():
                sequence = tokens + more
                place = done if len(sequence) >= length else following
                place[sequence] = place.get(sequence, 0.0) + weight * probability
        open_ = following
    return done


def true_law(model: TableModel, start: tuple[int, ...], length: int) -> dict[tuple[int, ...], float]:
    """The law of `length` tokens drawn from the model one by one."""
    law: dict[tuple[int, ...], float] = {(): 1.0}
    for _ in range(length):
        longer: dict[tuple[int, ...], float] = {}
        for tokens, weight in law.items():
            for token, probability in enumerate(model.law(start + tokens).tolist()):
                longer[(*tokens, token)] = weight * probability
        law = longer
    return law


def total_variation(left: dict[tuple[int, ...], float], right: dict[tuple[int, ...], float]) -> float:
    return 0.5 * sum(abs(left.get(key, 0.0) - right.get(key, 0.0)) for key in left.keys() | right.keys())


def distance(top: Verifier, model: TableModel, length: int, law: LawMaker | None = None) -> float:
    """Total variation between what a chain emits and the law of its target."""
    emitted = emitted_law(top, law or sampling(), START, length)
    assert sum(emitted.values()) == pytest.approx(1, abs=1e-12)
    return total_variation(emitted, true_law(model, START, length))
