# SPDX-License-Identifier: Apache-2.0
"""What steers an engine's chain, and keeps what it has learnt while no row is there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch

from ..control import Costs, OnlineControl, PassSeconds, Shares, SteadyControl
from ..exactness.context import Context
from ..generation.options import PolySpecOptions
from ..levels.emission import Emission
from ..levels.verifier import Verifier
from ..telemetry.counters import Check, Decision

Observer = Callable[[Check], None]


class Control(Protocol):
    """As `generation.loop.Control`; `finish` ends it.

    Attributes:
        decisions: changes of the way the chain is run.
    """

    decisions: list[Decision]

    def before(self, context: Context, limits: list[int]) -> None: ...

    def after(self, emission: Emission) -> None: ...

    def finish(self) -> None: ...


class Steering:
    """Makes the control of a chain that has just been built.

    Args:
        options: of the chain; device: of its target.
        costs: what is known of the chain that "auto" has chosen, or None.
        fixed: whether the caller asked for fixed sizes: nothing is steered.
    """

    def __init__(
        self, options: PolySpecOptions, device: torch.device, costs: Costs | None = None, *, fixed: bool = False
    ) -> None:
        self.options = options
        self.device = device
        self.costs = costs
        # Where a row's draws are its own levels', which number decides what would depend on who runs beside it.
        self.fixed = fixed or (not options.couples and costs is None)
        self._gauges: dict[int, PassSeconds] = {}

    def over(self, target: Verifier, observer: Observer) -> Control | None:
        """The control of these levels, which tells `observer` of checks as well; None where nothing is steered.

        Args:
            target: level 0, begun.
        """
        control: Control | None = None
        if self.options.polyspec_control == "online":
            control = OnlineControl(target, mode="engine")
        elif self.costs is not None and not self.fixed:
            control = SteadyControl(target, self.costs, shares=True, joining=True)
        elif not self.fixed:
            control = Shares(target, self._gauge, joining=True)
        level: object = target
        while isinstance(level, Verifier):
            level.observer = _both(level.observer, observer)
            level = level.below
        return control

    def _gauge(self, level: int) -> PassSeconds:
        return self._gauges.setdefault(level, PassSeconds(device=self.device, by_size=True))


def _both(first: Observer | None, second: Observer) -> Observer:
    if first is None:
        return second

    def observe(check: Check) -> None:
        first(check)
        second(check)

    return observe
