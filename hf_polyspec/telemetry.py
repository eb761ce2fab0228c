# SPDX-License-Identifier: Apache-2.0
"""What happened in a generation, per level. Counters only: showing them is `display.py`'s business.

The names are those vLLM, llama.cpp and AIPerf agree on (mean acceptance length counts the recovered or bonus token).
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch


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
    _overlap: list[tuple[torch.Tensor, int]] = field(default_factory=list, repr=False)

    @contextmanager
    def timed(self) -> Iterator[None]:
        """Add the wall time of the block to this level's seconds."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds += time.perf_counter() - start

    def record_round(self, drafted: int, accepted: int, drawn: bool = True) -> None:
        """One row was checked: `drafted` tokens proposed, the first `accepted` kept.

        `drawn` says whether one more token was drawn, which is so unless another row of the batch ended the round.
        """
        self.rounds += 1
        self.drafted += drafted
        self.accepted += accepted
        self.recovered += int(drawn and accepted < drafted)
        self.bonus += int(drawn and accepted == drafted)
        _grow(self.drafted_at, drafted)
        _grow(self.accepted_at, drafted)
        for i in range(drafted):
            self.drafted_at[i] += 1
        for i in range(accepted):
            self.accepted_at[i] += 1
        _grow(self.histogram, accepted + 1)
        self.histogram[accepted] += 1

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
        """Mean sum of min(p, q) over the judged positions: an estimate of the acceptance rate without coin noise."""
        if not self._overlap:
            return None
        total, positions = self._summed_overlap()
        return float(total) / positions if positions else None

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
        }


@dataclass
class PolySpecStats:
    """What happened in one `generate()` call.

    Attributes:
        levels: one `LevelStats` per member of the chain, the target first.
        token_levels: per row, the level that first proposed each emitted token (0: the target drew it itself).
        new_tokens: emitted tokens, all rows together.
        seconds: wall time of the whole call.
    """

    levels: list[LevelStats]
    token_levels: list[list[int]]
    new_tokens: int
    seconds: float

    @property
    def tokens_per_second(self) -> float:
        return self.new_tokens / self.seconds if self.seconds else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and lists, JSON-serialisable."""
        return {
            "new_tokens": self.new_tokens,
            "seconds": self.seconds,
            "tokens_per_second": self.tokens_per_second,
            "levels": [level.to_dict() for level in self.levels],
            "token_levels": [list(row) for row in self.token_levels],
        }

    def table(self) -> Any:
        """A `rich.table.Table` with a line per level."""
        from .display import stats_table

        return stats_table(self)

    def _repr_html_(self) -> str:
        """The table, where a notebook shows this object."""
        from .display import stats_html

        return stats_html(self)

    def to_html(self, tokenizer: Any, sequences: Any, prompt_length: int = 0) -> str:
        """The generated text as HTML, each token coloured by the level that first proposed it.

        Args:
            tokenizer: turns ids into text.
            sequences: `[B, L]` ids as `generate()` returned them.
            prompt_length: columns of `sequences` that are prompt.
        """
        from .display import tokens_html

        return tokens_html(self, tokenizer, sequences, prompt_length)


def _grow(counts: list[int], length: int) -> None:
    if len(counts) < length:
        counts.extend([0] * (length - len(counts)))
