# SPDX-License-Identifier: Apache-2.0
"""What one round of a verifier emitted."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from ..exactness.judgement import Judgement
from ..exactness.passes import Pass
from ..exactness.proposal import Proposal
from ..exactness.row_laws import picked
from ..exactness.row_tensors import RowTensors
from ..telemetry.counters import Counted


@dataclass(frozen=True)
class Emission:
    """What one round of a verifier emitted.

    Attributes:
        tokens: per row, accepted tokens and the recovered or bonus token; empty for rows that were not asked.
        p: `[B, E, V]`, the law each of them follows, unmodified; None where nobody tests against it.
        origins: per row, the level that first proposed each token.
        drafted: per row, how many tokens had been proposed.
        accepted: per row, how many of those were kept.
        logits, scores: `[B, E', V]` raw and processed, of the emitted positions; as `RowTensors` where rows differ in
            length.
        passed: the forward pass behind it.
        bias: per row, the total variation that a lossy verification introduced; empty when it was exact.
        counted: per row, what `drafted` and `accepted` come to as far as the text goes.
        leads: per row, how far each token was ahead of the second, where somebody asked (`Judgement.leads`).
    """

    tokens: list[list[int]]
    p: torch.Tensor | None
    origins: list[list[int]]
    drafted: list[int]
    accepted: list[int]
    logits: torch.Tensor | RowTensors
    scores: torch.Tensor | RowTensors
    passed: Pass
    bias: list[float] = field(default_factory=list)
    counted: list[Counted] = field(default_factory=list)
    leads: list[list[float]] = field(default_factory=list)

    def select(self, rows: list[int]) -> Emission:
        """Of some rows, in this order; without the laws and the pass's own output, which are for levels."""
        return Emission(
            [self.tokens[b] for b in rows],
            None,
            [self.origins[b] for b in rows],
            [self.drafted[b] for b in rows],
            [self.accepted[b] for b in rows],
            picked(self.logits, rows),
            picked(self.scores, rows),
            Pass(picked(self.logits, rows), None, self.passed.fed, [self.passed.read[b] for b in rows]),
            [self.bias[b] for b in rows] if self.bias else [],
            [self.counted[b] for b in rows] if self.counted else [],
        )


def origins_of(level: int, proposal: Proposal, judgement: Judgement) -> list[list[int]]:
    """Per row, the level that first proposed each token that a verifier emits, which itself is `level`."""
    return [
        [*from_below[:kept], level][: len(emitted)]
        for from_below, kept, emitted in zip(proposal.origins, judgement.accepted, judgement.tokens, strict=True)
    ]
