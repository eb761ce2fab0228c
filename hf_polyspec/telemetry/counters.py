# SPDX-License-Identifier: Apache-2.0
"""What every level of a chain did: counters, checks and decisions. How they are shown, they need not know.

The names are those vLLM, llama.cpp and AIPerf agree on (mean acceptance length counts the recovered or bonus token).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass(frozen=True)
class Counted:
    """What one row's check comes to, as far as it belongs to the text.

    Attributes:
        drafted: tokens proposed (of a tree: its depth); where the text ended inside, those up to its end.
        accepted: of those, tokens kept.
        drawn: whether one more token was drawn, which is so unless the text, or another row, ended the round.
    """

    drafted: int
    accepted: int
    drawn: bool

    @classmethod
    def of(cls, drafted: int, accepted: int, tokens: Sequence[int], eos: Collection[int]) -> Counted:
        """A check that emitted these tokens; none behind one that ends the text counts."""
        found = cls(drafted, accepted, len(tokens) > accepted)
        end = next((i for i, token in enumerate(tokens) if token in eos), None)
        return found if end is None else found.cut(end + 1)

    @property
    def emitted(self) -> int:
        """Tokens handed up."""
        return self.accepted + self.drawn

    def cut(self, tokens: int) -> Counted:
        """Only the first so many tokens count, 1 or more: proposals behind them were judged for nothing."""
        return Counted(tokens, tokens, False) if tokens <= self.accepted else self


@dataclass(frozen=True)
class Check:
    """One check of a batch by one level, as a control that steers the chain sees it.

    Attributes:
        level: the verifier's index; source: that of the level it asked, None if it asked nobody.
        asked: per row, most tokens it could have been offered; 0 for rows that took no part.
        drafted, accepted: per row, tokens offered and kept (of a tree: its depth, and the path). Where the text ended
            inside, all three count the tokens up to its end.
        offered: the longest draft of a row, whatever the text made of it.
        nodes: per row, nodes of the tree; empty when a chain was checked.
        fed: columns of the verifier's pass, of a row; columns: of all rows together.
        seconds: of the pass and the judgement; draft_seconds: until the proposal was there, all levels below included.
    """

    level: int
    source: int | None
    asked: list[int]
    drafted: list[int]
    accepted: list[int]
    offered: int
    nodes: list[int]
    fed: int
    seconds: float
    draft_seconds: float
    columns: int = 0


@dataclass(frozen=True)
class Decision:
    """A change of the way a chain is run, decided before the tokens that follow it were drawn.

    Attributes:
        token: tokens each row had emitted by then, on average.
        levels: indices of the levels that take part from now on.
        sizes: tokens that each of them but the target hands up.
        tree: nodes of the drafter's tree, 0 for a chain.
        reason: in a few words.
        tokens_per_second: predicted for one row; None before anything was measured.
    """

    token: float
    levels: tuple[int, ...]
    sizes: tuple[int, ...]
    tree: int
    reason: str
    tokens_per_second: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and lists, JSON-serialisable."""
        return {name: list(v) if isinstance(v, tuple) else v for name, v in vars(self).items()}


@dataclass
class LevelStats:
    """Counters of one level over one generation, summed over the rows of the batch.

    Attributes:
        name: the level's name.
        index: 0 for the target.
        forward_passes: forward passes of the level's model.
        seconds: wall time spent in the level itself, levels below excluded.
        rounds: row-wise checks; a batch of three rows that checks once counts three.
        drafted: tokens proposed to this level (a drafter: tokens it proposed).
        accepted: of those, tokens this level kept.
        recovered: tokens drawn from the residual after a rejection.
        bonus: tokens drawn after everything proposed was accepted.
        drafted_at: how often position i was proposed to this level.
        accepted_at: how often position i was accepted.
        histogram: `histogram[j]` is the number of rounds that accepted exactly j tokens.
        switched_off, switched_on: how often a control took the level out of the chain, and back into it.
        sizes: (tokens emitted by then, tokens it hands up from there on, 0 while off), where a control sets them.
        bias: expected biased tokens of a lossy verification, all rows together; 0 when it is exact.
        clock: seconds from some moment on; replaced in tests.
        trees: trees this level proposed, one a row and round; tree_nodes, tree_levels: their sizes, summed.
        draft_vocabulary: ids this level scored in its last round, None where it scored all.
    """

    name: str
    index: int
    forward_passes: int = 0
    seconds: float = 0.0
    rounds: int = 0
    drafted: int = 0
    accepted: int = 0
    recovered: int = 0
    bonus: int = 0
    drafted_at: list[int] = field(default_factory=list)
    accepted_at: list[int] = field(default_factory=list)
    histogram: list[int] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    switched_off: int = 0
    switched_on: int = 0
    sizes: list[tuple[float, int]] = field(default_factory=list)
    bias: float = 0.0
    clock: Callable[[], float] = field(default=time.perf_counter, repr=False)
    trees: int = 0
    tree_nodes: int = 0
    tree_levels: int = 0
    draft_vocabulary: int | None = None
    _overlap: list[tuple[torch.Tensor, int]] = field(default_factory=list, repr=False)

    @contextmanager
    def timed(self) -> Iterator[None]:
        """Add the wall time of the block to this level's seconds."""
        start = self.clock()
        try:
            yield
        finally:
            self.seconds += self.clock() - start

    def record_round(self, drafted: int, accepted: int, drawn: bool = True) -> None:
        """One row was checked: `drafted` tokens proposed, the first `accepted` kept.

        `drawn` says whether one more token was drawn, which is so unless another row of the batch ended the round.
        """
        self._add(Counted(drafted, accepted, drawn), 1)

    def withdraw(self, check: Counted, kept: int) -> None:
        """Of a round that was recorded only the first `kept` tokens belong to the text, which something else ended."""
        self._add(check, -1)
        if kept:
            self._add(check.cut(kept), 1)

    def _add(self, check: Counted, sign: int) -> None:
        self.rounds += sign
        self.drafted += sign * check.drafted
        self.accepted += sign * check.accepted
        self.recovered += sign * int(check.drawn and check.accepted < check.drafted)
        self.bonus += sign * int(check.drawn and check.accepted == check.drafted)
        _grow(self.drafted_at, check.drafted)
        _grow(self.accepted_at, check.drafted)
        for i in range(check.drafted):
            self.drafted_at[i] += sign
        for i in range(check.accepted):
            self.accepted_at[i] += sign
        _grow(self.histogram, check.accepted + 1)
        self.histogram[check.accepted] += sign

    def record_tree(self, nodes: int, levels: int) -> None:
        """This level proposed a tree to one row; one without nodes does not count."""
        self.drafted += nodes
        self.trees += int(nodes > 0)
        self.tree_nodes += nodes
        self.tree_levels += levels

    def record_overlap(self, total: torch.Tensor, positions: int) -> None:
        """Add a sum of min(p, q) over `positions` positions; kept on its device, so that adding never synchronises."""
        self._overlap.append((total.detach(), positions))
        if len(self._overlap) > 256:
            self._overlap = [self._summed_overlap()]

    def _summed_overlap(self) -> tuple[torch.Tensor, int]:
        return torch.stack([t.double() for t, _ in self._overlap]).sum(), sum(n for _, n in self._overlap)

    @property
    def emitted(self) -> int:
        """Tokens this level handed up: accepted, recovered and bonus."""
        return self.accepted + self.recovered + self.bonus

    @property
    def mean_acceptance_length(self) -> float | None:
        """Tokens emitted per round, recovered and bonus included; None before the first round."""
        return self.emitted / self.rounds if self.rounds else None

    @property
    def acceptance_rate(self) -> float | None:
        """Accepted / drafted."""
        return self.accepted / self.drafted if self.drafted else None

    @property
    def acceptance_rate_per_position(self) -> list[float]:
        """Of the proposals long enough to have position i, the share that had it accepted."""
        return [a / d if d else 0.0 for a, d in zip(self.accepted_at, self.drafted_at, strict=True)]

    @property
    def expected_acceptance_rate(self) -> float | None:
        """Mean sum of min(p, q) over the judged positions: an estimate of the acceptance rate without coin noise. Where
        levels share plain generation's noise, and in the greedy limit, the share of judged positions that was kept.

        Where several children of a node were drawn, those after the first count where it was rejected.
        """
        if not self._overlap:
            return None
        total, positions = self._summed_overlap()
        # a few such nodes can come to more than their expectation, 1 at most
        return min(1.0, float(total) / positions) if positions else None

    @property
    def mean_tree_nodes(self) -> float | None:
        """Nodes per proposed tree, None for a level that proposed none."""
        return self.tree_nodes / self.trees if self.trees else None

    @property
    def mean_tree_depth(self) -> float | None:
        """Levels per proposed tree, None for a level that proposed none."""
        return self.tree_levels / self.trees if self.trees else None

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and lists, JSON-serialisable."""
        return {
            "name": self.name,
            "index": self.index,
            "forward_passes": self.forward_passes,
            "seconds": self.seconds,
            "rounds": self.rounds,
            "drafted": self.drafted,
            "accepted": self.accepted,
            "recovered": self.recovered,
            "bonus": self.bonus,
            "mean_acceptance_length": self.mean_acceptance_length,
            "acceptance_rate": self.acceptance_rate,
            "expected_acceptance_rate": self.expected_acceptance_rate,
            "acceptance_rate_per_position": self.acceptance_rate_per_position,
            "acceptance_histogram": list(self.histogram),
            "notes": list(self.notes),
            "switched_off": self.switched_off,
            "switched_on": self.switched_on,
            "sizes": [list(pair) for pair in self.sizes],
            "bias": self.bias,
            "mean_tree_nodes": self.mean_tree_nodes,
            "mean_tree_depth": self.mean_tree_depth,
            "draft_vocabulary": self.draft_vocabulary,
        }


def _grow(counts: list[int], length: int) -> None:
    if len(counts) < length:
        counts.extend([0] * (length - len(counts)))
