# SPDX-License-Identifier: Apache-2.0
"""Arguments with an entry for each prompt that reach a model's modules past its forward.

PEFT gives `adapter_names` (and, for activated LoRA, `alora_offsets`) to every layer with an adapter through hooks, for
the whole of a generate() call. Rows leave a chain's batch when they have ended, and a pass covers several tokens, so
what the hooks say is put right before a layer reads it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

from torch import nn

from .counted_places import CountedPlaces
from .walking import modules_of, once_of

FROM_THE_END = {"alora_offsets"}
"""Arguments that count columns from the end of the prompt."""


class RowArguments:
    """What hooks on a model's modules add to their calls, row by row.

    Args:
        model: its hooks are looked for once; those that have been there for other rows are not touched.
        cached: whether a pass reads only what a cache lacks.
    """

    def __init__(self, model: nn.Module, cached: bool = True) -> None:
        self._counted = CountedPlaces(model) if cached else None  # else plain generation's passes count all ids, too
        self._named = once_of(model, "arguments by row", _named)

    @property
    def any(self) -> bool:
        """Whether there are any."""
        return bool(self._named)

    @contextmanager
    def of(self, rows: list[int] | None, grown: list[int]) -> Iterator[None]:
        """During a pass, the modules are given the entries of the rows that are in it.

        Args:
            rows: of the batch that generate() was called with, None for all.
            grown: columns that each row of the pass ends behind the prompt.
        """

        def put_right(names: set[str], _module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
            for name in names:
                value = kwargs.get(name)
                if not isinstance(value, (list, tuple)):
                    continue
                if rows is not None and len(value) > max(rows):
                    value = [value[row] for row in rows]
                if name in FROM_THE_END and len(value) == len(grown):
                    value = [None if n is None else n + more for n, more in zip(value, grown, strict=True)]
                kwargs[name] = value
            return args, kwargs

        # Hooks run in the order in which they came, so these see what the others have added.
        hooks = [
            module.register_forward_pre_hook(partial(put_right, names), with_kwargs=True)
            for module, names in self._named
            if rows is not None or names & FROM_THE_END
        ]
        try:
            with nullcontext() if self._counted is None else self._counted.of(grown):
                yield
        finally:
            for hook in hooks:
                hook.remove()


def _named(model: nn.Module) -> list[tuple[nn.Module, set[str]]]:
    """Modules, and what hooks add to their calls by name."""
    found = []
    for module in [part for part in modules_of(model) if part._forward_pre_hooks]:
        names = {
            name
            for hook in module._forward_pre_hooks.values()
            if isinstance(hook, partial)
            for name, value in hook.keywords.items()
            if isinstance(value, (list, tuple))
        }
        if names:
            found.append((module, names))
    return found
