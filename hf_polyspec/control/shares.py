# SPDX-License-Identifier: Apache-2.0
"""The control of a chain whose levels stay as they are, while the columns of its rows are shared out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

import torch

from ..exactness.context import Context
from ..host.separate import SeparateRunner
from ..levels.emission import Emission
from ..levels.verifier import NoDraft, Verifier
from ..telemetry.counters import Check, Decision
from .columns import Columns
from .known import Learnt
from .pass_seconds import PassSeconds
from .setups import spine

MANY = 8
"""Rows of one call from which on columns are shared out though nobody asked for it: a pass over fewer has some to spare
on every machine that was measured."""

Gauges = Callable[[int], PassSeconds]
"""What is known of the passes of a level, by its index; learns."""


def shared_out(top: Verifier, gauges: Gauges, learnt: Mapping[int, Learnt] = MappingProxyType({})) -> list[Columns]:
    """Have all verifiers of a chain share out their columns; those that read each row by itself have none to share.

    Args:
        top: the target, begun; gauges: see `Gauges`.
        learnt: by index of a verifier, what was learnt of the drafts below it in a generation before.
    """
    return [
        Columns(
            level,
            gauges(level.index),
            gauges(level.below.index) if isinstance(level.below, Verifier) else None,
            passes_by=True,
            learnt=learnt[level.index].carried() if level.index in learnt else None,
        )
        for level in spine(top)
        if isinstance(level, Verifier) and not isinstance(level.runner, SeparateRunner)
    ]


def tell_left(columns: Sequence[Columns], left: Sequence[int]) -> None:
    """Tell the target's columns how many tokens each row may emit yet; levels below draft for rows that it asks for."""
    for own in columns:
        if own.level.index == 0:
            own.tell_left(left)


def valued(columns: Sequence[Columns], emission: Emission, tokens: float) -> float:
    """Tokens of a row, as many as they are worth (`Columns.worth`): most rows may only have waited for the last.

    Args:
        columns: of the target first; emission: of a round; tokens: of a row in it, on average.
    """
    if len({row.emitted for row, own in zip(emission.counted, emission.tokens, strict=True) if own}) == 1:
        return tokens  # whatever each is worth
    worth = columns[0].worth
    if worth is None:
        return tokens
    of_rows = zip(worth, emission.counted, emission.tokens, strict=True)
    rows = [(value, row.emitted) for value, row, own in of_rows if own]
    whole = sum(value for value, _ in rows)
    return sum(value * emitted for value, emitted in rows) / whole if whole else tokens


class Shares:
    """Shares out the columns of one loop, past a middle where its drafter alone promises more, and does nothing else.

    Args:
        top: the target, begun, with the levels below it; gauges: see `Gauges`.
        joining: whether other rows take the place of those that end, so that a token is worth the same in all of them.
    """

    def __init__(self, top: Verifier, gauges: Gauges, *, joining: bool = False) -> None:
        self.joining = joining
        self.columns = shared_out(top, gauges)
        self.decisions: list[Decision] = []
        for level in spine(top):
            if isinstance(level, Verifier):
                level.observer = self.observe

    def before(self, context: Context, limits: list[int]) -> None:
        """Of what is chosen in a round, what there is left to emit is known before it."""
        if not self.joining:
            tell_left(self.columns, limits)

    def after(self, emission: Emission) -> None:
        """Likewise."""

    def observe(self, check: Check) -> None:
        """A verifier has judged a proposal."""
        for columns in self.columns:
            columns.observe(check)

    def finish(self) -> None:
        """The loop is over."""


def shares_of(top: Verifier, rows: int, device: torch.device) -> Shares | None:
    """The control of a chain for which nobody has named one, in a call of many rows: sizes are the most a row drafts.

    Args:
        top: the target, begun, with the levels below it; rows: of the call; device: of the target.

    Returns:
        None where there is nothing to share.
    """
    if rows < MANY or isinstance(top.below, NoDraft):
        return None
    gauges: dict[int, PassSeconds] = {}
    return Shares(top, lambda level: gauges.setdefault(level, PassSeconds(device=device, by_size=True)))
