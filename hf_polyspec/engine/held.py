# SPDX-License-Identifier: Apache-2.0
"""The target and the levels of an engine, held for as long as it runs; those of "auto" follow the model."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

from ..control import Costs
from ..generation.chain import check_assistants
from ..generation.kernels import packed
from ..generation.members import leaves_choice, lent, members
from ..generation.options import PolySpecOptions
from ..generation.trial import tried


class Held:
    """What an engine runs.

    Args:
        model: the caller's; assistants: as for `generate()`, "auto" included.
        said: options that the caller gave; they come before those that "auto" chooses.

    Attributes:
        target: the model, or a packed copy of it; levels: those below.
        options: of the chain; costs: what is known of a chain that "auto" chose; chosen: its line on why.

    Raises:
        TypeError, ValueError: what cannot be a chain, in one sentence.
    """

    def __init__(self, model: Any, assistants: Any, said: dict[str, Any]) -> None:
        self.model = model
        self.said = said
        self.options = PolySpecOptions.read(said, model.generation_config)
        self.costs: Costs | None = None
        self.chosen: str | None = None
        self.target: Any = None
        self.levels: list[Any] = []
        self._members: tuple[int, ...] = ()
        self._stack = ExitStack()
        self._chooses = leaves_choice(assistants, None)
        if self._chooses:
            self.renew()
            return
        if isinstance(assistants, str):
            raise TypeError(f"an Engine is given its levels as a list, got {assistants!r}; name them one by one.")
        given = members(model, list(assistants) if isinstance(assistants, tuple) else assistants)
        self._hold(model, check_assistants(model, given))

    def renew(self) -> None:
        """No row is there: what "auto" chose is made anew where the model has changed since."""
        if not self._chooses:
            return
        from ..auto import prepare  # quantisation, which most engines never need

        ready = prepare(self.model, (), packs=self.options.polyspec_pack, mode="engine", tries=tried)
        # A drafter without a model is made for every call, and the one that is held will do.
        found = tuple(id(one) for one in (ready.target, *ready.assistants) if hasattr(one, "config"))
        if found == self._members:
            return
        self._hold(ready.target, check_assistants(ready.target, ready.assistants))
        self._members = found
        self.options = PolySpecOptions.read({**ready.options, **self.said}, self.model.generation_config)
        self.costs, self.chosen = ready.costs, ready.line

    def close(self) -> None:
        """The levels are the caller's again."""
        self._stack.close()

    def _hold(self, target: Any, levels: list[Any]) -> None:
        self._stack.close()
        self._stack = ExitStack()
        try:
            self.levels = self._stack.enter_context(lent(levels))
            self._stack.enter_context(packed(self.levels if self.options.polyspec_pack else [], target))
        except BaseException:
            self._stack.close()
            raise
        self.target = target
