# SPDX-License-Identifier: Apache-2.0
"""How many of a head's guesses a target would accept, position by position, on texts it has not learned from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from hf_polyspec.eagle.modeling import EagleHead
from hf_polyspec.eagle.training.dataset import Batch
from hf_polyspec.eagle.training.losses import TargetView
from hf_polyspec.eagle.training.shards import GREEDY, SAMPLED
from hf_polyspec.eagle.training.unroll import shifted, unroll

KIND_NAMES = {GREEDY: "greedy", SAMPLED: "sampled"}


@dataclass
class Acceptance:
    """Counts over texts of one kind, one entry a draft position.

    The token to hit is the one the text holds. In a greedy text that is the target's favourite; in a sampled text it
    is a draw from the target, so hitting it is as frequent as the one-hot rule accepts a deterministic draft.

    `rows` to `survived` look at a draft from every place of an answer. `passes` looks at the drafts that decoding would
    make: the next begins where the last one ended. Those begin where guessing is hard more often than not, so their
    mean is lower. The passes emit one token a place: as many as `rows` has at the first position.

    Args:
        steps: draft positions, S.
        ranks: the k of the top-k hits.
        passes: of the target, if it decoded the answers with chains of S guesses.
    """

    steps: int
    ranks: tuple[int, ...] = (1, 2, 4, 8)
    passes: int = 0
    rows: list[int] = field(default_factory=list)
    hits: list[list[int]] = field(default_factory=list)
    alive: list[int] = field(default_factory=list)
    survived: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.rows = self.rows or [0] * self.steps
        self.hits = self.hits or [[0] * len(self.ranks) for _ in range(self.steps)]
        self.alive = self.alive or [0] * self.steps
        self.survived = self.survived or [0] * self.steps

    def top(self, rank_index: int) -> list[float]:
        """Share of rows whose token is among the first k guesses, the true path given, for every position."""
        return [hit[rank_index] / max(rows, 1) for hit, rows in zip(self.hits, self.rows, strict=True)]

    @property
    def chain(self) -> list[float]:
        """Acceptance of the first guess at every position, given that all guesses before it were accepted."""
        return [kept / max(alive, 1) for kept, alive in zip(self.survived, self.alive, strict=True)]

    @property
    def mean_length(self) -> float:
        """Tokens a pass of the target with a chain of S guesses, bonus included; 1 where nothing was counted."""
        return self.rows[0] / self.passes if self.passes else 1.0

    def add(self, other: Acceptance) -> None:
        """Adds another count of the same shape."""
        self.passes += other.passes
        for step in range(self.steps):
            self.rows[step] += other.rows[step]
            self.alive[step] += other.alive[step]
            self.survived[step] += other.survived[step]
            for index in range(len(self.ranks)):
                self.hits[step][index] += other.hits[step][index]

    def counts(self) -> torch.Tensor:
        """All counts as one tensor `[S, 4 + ranks]`, to be added up over processes."""
        columns = zip(self.rows, self.alive, self.survived, self.hits, strict=True)
        # the passes, which have no position, stand in every row
        return torch.tensor([[self.passes, rows, alive, kept, *hits] for rows, alive, kept, hits in columns])

    @classmethod
    def from_counts(cls, counts: torch.Tensor, ranks: tuple[int, ...]) -> Acceptance:
        """The inverse of `counts`.

        Args:
            counts: `[S, 4 + ranks]`.
            ranks: the k of the top-k hits.
        """
        table = counts.tolist()
        rows, alive, survived = ([row[index] for row in table] for index in range(1, 4))
        return cls(len(table), ranks, table[0][0], rows, [row[4:] for row in table], alive, survived)

    def as_dict(self) -> dict[str, object]:
        """Rounded for a file or a tracker."""
        return {
            "rows": self.rows[0],
            "chain": [round(rate, 4) for rate in self.chain],
            **{f"top{k}": [round(rate, 4) for rate in self.top(i)] for i, k in enumerate(self.ranks)},
            "mean_acceptance_length": round(self.mean_length, 4),
        }


@torch.no_grad()
def count_acceptance(
    head: EagleHead, batch: Batch, view: TargetView, steps: int, ranks: Sequence[int] = (1, 2, 4, 8)
) -> dict[int, Acceptance]:
    """Counts hits on one batch.

    Args:
        head: the head, in evaluation mode.
        batch: held-out texts; their prompts do not count, so `answer` must not hold them.
        view: what the target says about them.
        steps: draft positions.
        ranks: the k of the top-k hits, ascending, the first one 1.

    Returns:
        Counts by kind of text.
    """
    device = batch.tokens.device
    most = min(max(ranks), int(head.config.draft_vocab_size or head.config.vocab_size))
    found = {kind: Acceptance(steps, tuple(ranks)) for kind in sorted(set(batch.kinds.tolist()))}
    alive = torch.ones(batch.tokens.shape[0], batch.tokens.shape[1] - 1, dtype=torch.bool, device=device)
    accepted = torch.zeros_like(alive, dtype=torch.long)
    for step, hidden in enumerate(unroll(head, batch.tokens, view.features, steps)):
        label = shifted(batch.tokens, 2 + step)  # [B, T-1]
        # a draft begins after a token of the answer, the first of which the target itself gave
        counted = shifted(batch.answer, 1).bool() & shifted(batch.answer, 2 + step).bool()
        guesses = torch.full((*counted.shape, most), -1, dtype=torch.long, device=device)
        best = head.logits(hidden[counted]).topk(most, dim=-1).indices
        guesses[counted] = head.draft_to_target(best)
        match = guesses == label[..., None]  # [B, T-1, most]
        for kind, tally in found.items():
            rows = counted & (batch.kinds == kind)[:, None]
            tally.rows[step] += int(rows.sum())
            tally.alive[step] += int((rows & alive).sum())
            tally.survived[step] += int((rows & alive & match[..., 0]).sum())
            for index, rank in enumerate(ranks):
                tally.hits[step][index] += int((match[..., :rank].any(dim=-1) & rows).sum())
        alive = alive & match[..., 0]
        accepted += alive & counted
    for text, lengths in zip(batch.texts, accepted.tolist(), strict=True):
        found[text.kind].passes += passes_over(lengths, max(text.prompt_length, 1), len(text) - 1)
    return found


def passes_over(accepted: Sequence[int], first: int, last: int) -> int:
    """How many passes decode an answer.

    Args:
        accepted: for every row of a text, how many guesses of a chain drafted from it hold; row i guesses token i+2.
        first: place of the answer's first token, which the pass that reads the prompt gives.
        last: place of its last token.
    """
    place = first
    passes = 0
    while place < last:
        place += accepted[place - 1] + 1
        passes += 1
    return passes
