# SPDX-License-Identifier: Apache-2.0
"""A runner that gives every row a runner of its own, for any model: rows may join, and each is as if it ran alone.

Nothing is gained by running rows together, and nothing is left out: models that keep a state, count columns or read a
text anew at some length run here as in a batch of one, to the last bit. It is what rows that share passes are
compared with.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.functional import pad

from ..exactness.context import Context, Prompt
from ..exactness.passes import Pass
from ..telemetry.counters import LevelStats
from .runner import ModelRunner

if TYPE_CHECKING:
    from ..exactness.proposal import TreeProposal


class SeparateRunner(ModelRunner):
    """A `ModelRunner` over one runner a row.

    Args:
        make: makes the runner of a row; model, name, device, options: what it makes it with, see `ModelRunner`.
    """

    def __init__(
        self,
        make: Callable[..., ModelRunner],
        model: Any,
        name: str,
        device: torch.device | None = None,
        **options: Any,
    ) -> None:
        super().__init__(model, name, device, **{key: value for key, value in options.items() if key != "kept"})
        self._make = partial(make, model, name, device, **options)
        first = self._make()  # says what it can do; the first row takes it
        self.cuts, self.steps = first.cuts, first.steps
        self._spare: ModelRunner | None = first
        self.rows: list[ModelRunner] = []
        self._prompts: tuple[Prompt | None, list[Prompt]] = (None, [])
        self._passes: list[Pass | None] = []

    def add_rows(self, count: int) -> None:
        for _ in range(count):
            row, self._spare = self._spare or self._make(), None
            self.rows.append(row)
        self._tell_memo()

    def keep_rows(self, rows: list[int]) -> None:
        self.rows = [self.rows[row] for row in rows]
        self._tell_memo()

    def run(self, context: Context, drafts: list[list[int]], stats: LevelStats, *, columns: int = 0) -> Pass:
        """As `ModelRunner.run`; rows that are not `asked` are left out, and their logits mean nothing."""

        def read(row: ModelRunner, b: int, own: Context) -> Pass:
            return row.run(own, [drafts[b]], stats, columns=columns)

        return self._together(context, read, 1 + max(map(len, drafts)))

    def run_tree(self, context: Context, tree: TreeProposal, stats: LevelStats) -> Pass:
        def read(row: ModelRunner, b: int, own: Context) -> Pass:
            return row.run_tree(own, tree.select([b]), stats)

        return self._together(context, read, 1 + max(map(len, tree.tokens)))

    def keep_paths(self, passed: Pass, context: Context, tree: TreeProposal, paths: list[list[int]]) -> Pass:
        for b, (row, own) in enumerate(zip(self.rows, self._passes, strict=True)):
            if own is not None:
                one = self._one(context, b)
                self._passes[b] = row.keep_paths(own, one, tree.select([b]), [paths[b]])
        self._tell_memo()
        return self._joined(passed.logits, passed.output)

    def prefill(
        self, context: Context, chunk: int, stats: LevelStats, watch: Callable[[Pass], None] | None = None
    ) -> None:
        raise ValueError("prefill_chunk_size is not served where rows join; leave it out.")

    def within(self, context: Context, limits: list[int]) -> list[int]:
        if self._table is None:
            return limits
        return [self._table.within(self._one(context, b), [limit])[0] for b, limit in enumerate(limits)]

    def _one(self, context: Context, b: int) -> Context:
        known, prompts = self._prompts
        if known is not context.prompt:
            prompts = [context.prompt.select([row]) for row in range(context.batch)]
            self._prompts = context.prompt, prompts
        return Context([context.ids[b]], prompts[b])

    def _together(self, context: Context, read: Callable[[ModelRunner, int, Context], Pass], wanted: int) -> Pass:
        """One pass a row that is asked, and what came out as if of one pass; each row's logits are `[1, W', V]`."""
        asked, self.asked = self.asked, None
        self._passes = [None] * len(self.rows)
        lenders: list[ModelRunner] | list[None] = [None] * len(self.rows)
        if isinstance(self.lender, SeparateRunner):
            lenders = self.lender.rows
        for b, (row, lender) in enumerate(zip(self.rows, lenders, strict=True)):
            if asked is not None and not asked[b]:
                continue
            row.record, row.stays = self.record, self.stays
            row.lender, row.borrows_from = lender, self.borrows_from
            self._passes[b] = read(row, b, self._one(context, b))
        self._tell_memo()
        some = next(one for one in self._passes if one is not None)
        logits = some.logits.new_zeros(len(self.rows), wanted, some.logits.shape[2])
        for b, one in enumerate(self._passes):
            if one is not None:
                logits[b, : one.logits.shape[1]] = one.logits[0]
        return self._joined(logits, self._states())

    def _states(self) -> Any:
        """Hidden states `[B, F, H]`, rows ending at the right edge; None where none were recorded."""
        found = [None if one is None else getattr(one.output, "hidden_states", None) for one in self._passes]
        some = next((states for states in found if states is not None), None)
        if some is None:
            return None
        fed = self._fed()
        layers: list[torch.Tensor | None] = []
        for place, like in enumerate(some):
            if like is None:
                layers.append(None)
                continue
            rows = [like.new_zeros(1, fed, like.shape[2]) if s is None else _right(s[place], fed) for s in found]
            layers.append(torch.cat(rows))
        return SimpleNamespace(hidden_states=layers)

    def _joined(self, logits: torch.Tensor, output: Any) -> Pass:
        fed = self._fed()
        read = [[] if one is None else one.read[0] for one in self._passes]
        counts = [0 if one is None else min(one.fed, len(one.read[0])) for one in self._passes]
        kept: list[list[int]] | None = None
        if any(one is not None and one.kept is not None for one in self._passes):
            kept = [
                [] if one is None or one.kept is None else [fed - one.fed + column for column in one.kept[0]]
                for one in self._passes
            ]
        return Pass(logits, output, fed, read, kept, counts)

    def _fed(self) -> int:
        return max(one.fed for one in self._passes if one is not None)

    def _tell_memo(self) -> None:
        """What the rows hold, for whoever asks the runner itself."""
        self.memo = [row.memo[0] if row.memo else [] for row in self.rows]


def _right(states: torch.Tensor, width: int) -> torch.Tensor:
    """`[1, F, H]` with zeros in front, as wide as the widest."""
    return states if states.shape[1] == width else pad(states, (0, 0, width - states.shape[1], 0))
