# SPDX-License-Identifier: Apache-2.0
"""Passes that processes compute together though each of them generates a text of its own (FSDP2).

Weights are gathered layer by layer as a pass comes to them, by all processes or by none. How many passes a chain needs
is nobody's to know beforehand, nor how many are tried before. So every process says before each pass of the target that
it has one, and who waits for the others, or has come to the end of its text, goes along with a token of padding.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..errors import LevelError
from .ranks import Ranks, Spread, is_spread_by_itself, talking
from .release import inner_model, input_device
from .whole import gather, is_put_together, lent_parts

# What a process has to say before it does anything together with the others; the greatest counts.
_ENDED, _READY, _PASS, _PARTS, _FAILED, _REFUSED = range(6)
FAILED = (
    "another process that holds a part of the target's weights failed in the middle of its generation, and no pass can "
    "be computed without it."
)


class Turns:
    """One generation of this process, from the first look at it to the end of the last process's.

    Args:
        model: the target; ranks: the processes that hold it.

    Attributes:
        taken: whether they hold parts of its weights; nothing is done but there.
    """

    def __init__(self, model: Any, ranks: Ranks) -> None:
        self.model = model
        self.ranks = ranks
        self.taken = isinstance(ranks, Spread)
        self._handles: list[Any] = []
        self._inside = False
        self._over: Exception | None = None  # why nothing more can be done together

    def open(self) -> None:
        """From here on this process says when it has a pass."""
        if self.taken:
            self._handles = [
                self.model.register_forward_pre_hook(self._before, prepend=True),
                self.model.register_forward_hook(self._after),
            ]

    def put_together(self) -> None:
        """Embedding and lm_head of the target as a whole in this process, for what computes with them; the others, who
        may have no use for them, hand out their parts at their next turn.

        Raises:
            LevelError, ValueError: as of a pass.
        """
        self._reshard()
        if all(is_put_together(part) for part in _heads_parts(self.model)):
            return
        self._fails_if(self._say(_PARTS))
        self._gather(keeps=True)

    def begin(self) -> None:
        """Everything has been checked here: wait until it has everywhere.

        Raises:
            ValueError: another process refused.
        """
        self._go_along(_READY)

    def end(self) -> None:
        """This text is whole: take part until all are. Where another process fails now, that is its own affair."""
        self._close()
        self._go_along(_ENDED)

    def refuse(self, reason: str) -> None:
        """This process refused before anything was generated."""
        self._close()
        if not self._inside and self._over is None:
            self._say(_REFUSED, reason)

    def fail(self) -> None:
        """This process failed. Where a pass broke off the others wait in the middle of it, and a word from here would
        be taken for something else; otherwise they wait for its next turn."""
        self._close()
        if not self._inside and self._over is None:
            self._say(_FAILED)

    def _close(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _before(self, module: Any, inputs: Any) -> None:
        while (said := self._say(_PASS)) == _PARTS:
            self._gather(keeps=False)
        self._fails_if(said)
        self._inside = True

    def _fails_if(self, said: int) -> None:
        if said == _FAILED:
            self._over = LevelError(FAILED)
            raise self._over

    def _gather(self, *, keeps: bool) -> None:
        """What a head computes with, by all processes."""
        self._reshard()
        self._inside = True
        with talking():
            for part in _heads_parts(self.model):
                gather(part, keeps=keeps)
        self._inside = False

    def _reshard(self) -> None:
        """Some modules are left whole after a pass."""
        for module in self.model.modules():
            if is_spread_by_itself(module):
                module.reshard()

    def _after(self, module: Any, inputs: Any, output: Any) -> None:
        self._inside = False

    def _say(self, what: int, reason: str | None = None) -> int:
        """What counts of what all say."""
        assert isinstance(self.ranks, Spread)
        if self._over is not None:  # a pass that was only tried may have failed of it unnoticed
            raise self._over
        try:
            found = self.ranks.greatest(what)
            reasons = self.ranks.gathered(reason) if found == _REFUSED else []
        except LevelError as error:
            self._over = error
            raise
        if found == _REFUSED and what != _REFUSED:
            rank, why = next((rank, why) for rank, why in enumerate(reasons) if why is not None)
            self._over = ValueError(f"process {rank} of {self.ranks.size} refused this call: {why}")
            raise self._over
        return found

    @torch.no_grad()
    def _go_along(self, what: int) -> None:
        """Take part in the others' passes until all say the same."""
        handles, self._handles = self._handles, []
        ids = torch.zeros(1, 1, dtype=torch.long, device=input_device(self.model))
        for handle in handles:
            handle.remove()
        while (said := self._say(what)) in (_PASS, _PARTS):
            if said == _PARTS:
                self._gather(keeps=False)
            else:
                self.model(input_ids=ids, use_cache=False)
        if handles:
            self.open()


def _heads_parts(model: Any) -> list[nn.Module]:
    return [part for part in lent_parts(inner_model(model)) if part is not None]
