# SPDX-License-Identifier: Apache-2.0
"""The control of a chain whose levels stay as they are, while the columns of its rows are shared out."""

from __future__ import annotations

from collections.abc import Callable

from ..exactness.context import Context
from ..host.separate import SeparateRunner
from ..levels.emission import Emission
from ..levels.verifier import Verifier
from ..telemetry.counters import Check, Decision
from .columns import Columns
from .pass_seconds import PassSeconds
from .setups import spine

Gauges = Callable[[int], PassSeconds]
"""What is known of the passes of a level, by its index; learns."""


def shared_out(top: Verifier, gauges: Gauges) -> list[Columns]:
    """Have all verifiers of a chain share out their columns; those that read each row by itself have none to share.

    Args:
        top: the target, begun; gauges: see `Gauges`.
    """
    return [
        Columns(
            level,
            gauges(level.index),
            gauges(level.below.index) if isinstance(level.below, Verifier) else None,
            passes_by=True,
        )
        for level in spine(top)
        if isinstance(level, Verifier) and not isinstance(level.runner, SeparateRunner)
    ]


class Shares:
    """Shares out the columns of one loop, past a middle where its drafter alone promises more, and does nothing else.

    Args:
        top: the target, begun, with the levels below it; gauges: see `Gauges`.
    """

    def __init__(self, top: Verifier, gauges: Gauges) -> None:
        self.columns = shared_out(top, gauges)
        self.decisions: list[Decision] = []
        for level in spine(top):
            if isinstance(level, Verifier):
                level.observer = self.observe

    def before(self, context: Context, limits: list[int]) -> None:
        """Nothing is chosen between rounds."""

    def after(self, emission: Emission) -> None:
        """Likewise."""

    def observe(self, check: Check) -> None:
        """A verifier has judged a proposal."""
        for columns in self.columns:
            columns.observe(check)

    def finish(self) -> None:
        """The loop is over."""
