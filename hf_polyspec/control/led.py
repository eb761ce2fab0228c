# SPDX-License-Identifier: Apache-2.0
"""One control for levels whose passes several processes share: the first process has it, and the others follow."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Sequence

from ..errors import LevelError
from ..exactness.context import Context
from ..host.ranks import Ranks
from ..levels.base import Drafter
from ..levels.emission import Emission
from ..levels.sequential import SequentialDrafter
from ..levels.verifier import Verifier
from ..telemetry.counters import Decision
from .estimates import Times
from .online import OnlineControl
from .readiness import scout
from .setups import Chain, spine

_GO, _SCOUT, _FAILED = 1, 2, 3
_NONE = -1
_SIZES = 4
"""Numbers that a shared level is set up with."""


def online_control(
    top: Verifier, shared: Sequence[Drafter], ranks: Ranks, mode: Hashable
) -> OnlineControl | LedControl | None:
    """The control of `polyspec_control="online"` for this process; None where there is nothing for it to do.

    Args:
        top: the target, begun, with the levels below it.
        shared: levels that run in all processes, the target first; only where there are several.
        ranks: the processes; mode: see `OnlineControl`.
    """
    if len(shared) > 1:
        return LedControl(top, shared, ranks, mode)
    return OnlineControl(top, mode=mode) if ranks.leads else None


class LedControl:
    """`OnlineControl` in the first process; the others' shared levels are set up as its are, once a round.

    Attributes:
        decisions: see `OnlineControl`; none where another process takes them.
    """

    def __init__(self, top: Verifier, shared: Sequence[Drafter], ranks: Ranks, mode: Hashable) -> None:
        self.shared = list(shared)
        self.ranks = ranks
        self.control = OnlineControl(top, mode=mode) if ranks.leads else None
        self._follows = Chain(spine(top)) if self.control is None else None
        if self.control is not None:
            self.control.scout = self._scout

    @property
    def decisions(self) -> list[Decision]:
        return [] if self.control is None else self.control.decisions

    def before(self, context: Context, limits: list[int]) -> None:
        """See `OnlineControl.before`; collective."""
        if self.control is None:
            self._follow(context)
            return
        try:
            self.control.before(context, limits)
        except Exception:
            self._tell(_FAILED)
            raise
        self._tell(_GO, sizes=[size for level in self.shared for size in self._sizes(level)])

    def after(self, emission: Emission) -> None:
        """See `OnlineControl.after`."""
        if self.control is not None:
            self.control.after(emission)

    def finish(self) -> None:
        """See `OnlineControl.finish`."""
        if self.control is not None:
            self.control.finish()
        if self._follows is not None:
            self._follows.restore()

    def _tell(self, kind: int, place: int = 0, sizes: Sequence[int] = ()) -> list[int]:
        return self.ranks.first([kind, place, *(sizes or [0] * (_SIZES * len(self.shared)))])

    def _scout(self, level: Drafter, context: Context, times: Times, clock: Callable[[], float]) -> float:
        """`readiness.scout`, in which the others take part where they share the level."""
        place = self._place(level)
        if place != _NONE:
            self._tell(_SCOUT, place)
        return scout(level, context, times, clock)

    def _follow(self, context: Context) -> None:
        while True:
            kind, place, *sizes = self._tell(0)
            if kind == _FAILED:
                raise LevelError("the target: the control of this chain failed in process 0.")
            if kind == _GO:
                break
            scout(self.shared[place], context, Times(), time.perf_counter)
        for at, level in enumerate(self.shared):
            self._set(level, sizes[_SIZES * at : _SIZES * (at + 1)])

    def _sizes(self, level: Drafter) -> list[int]:
        """Which shared level is asked, and sizes."""
        found = [_NONE] * _SIZES
        if isinstance(level, Verifier):
            limit = _NONE if level.draft_limit is None else level.draft_limit
            found[:3] = self._place(level.source), level.block_size, limit
        elif isinstance(level, SequentialDrafter):
            found[3] = level.draft_tokens
        return found

    def _set(self, level: Drafter, sizes: list[int]) -> None:
        source, block, limit, draft = sizes
        if isinstance(level, Verifier) and self._follows is not None:
            # What is not shared is in process 0, which tells what it offers, whatever it is.
            level.source = self._follows.nothing if source == _NONE else self.shared[source]
            level.block_size = block
            level.draft_limit = None if limit == _NONE else limit
        elif isinstance(level, SequentialDrafter):
            level.draft_tokens = draft

    def _place(self, level: Drafter) -> int:
        return next((at for at, one in enumerate(self.shared) if one is level), _NONE)
