# SPDX-License-Identifier: Apache-2.0
"""Keys and values that a level's cache holds, as a model below it reads them that makes none of its own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ..exactness.context import Context, common_prefix
from .ragged import RaggedRunner
from .runner import ModelRunner
from .separate import SeparateRunner

Shared = dict[str, tuple[torch.Tensor, torch.Tensor]]
"""Keys and values `[1, H, S, D]` by the kind of layer that made them."""


class SharedKeys:
    """What some layers of a runner's cache hold of a row.

    Nothing is copied: it is read where the cache has it, and holds until the runner's next pass.

    Args:
        runner: of the level above; layers: by kind, the layer of its cache that is read.
    """

    def __init__(self, runner: ModelRunner, layers: Mapping[str, int]) -> None:
        self.runner = runner
        self.layers = layers

    def read(self, row: int, context: Context, wanted: int) -> tuple[Shared, int]:
        """Keys and values of the first ids of a row, without those of left padding.

        Args:
            row: its place in the batch; context: the rows as they are now.
            wanted: of so many ids, padding included, at most.

        Returns:
            They, and of how many ids; none of 0. A window's are those that are still held.
        """
        found = [
            (self._held(runner, place, context, row), runner, place)
            for runner, place in (_own(one, row) for one in (self.runner, self.runner.lender))
            if runner is not None
        ]
        held, runner, place = max(found, key=lambda one: one[0])
        count, padding = min(held, wanted), _padding(context, row)
        if count <= padding:
            return {}, 0
        pick = _of_ragged if isinstance(runner, RaggedRunner) else _of_rectangle
        shared = {kind: pick(runner, place, index, padding, count) for kind, index in self.layers.items()}
        return shared, count

    def _held(self, runner: Any, place: int, context: Context, row: int) -> int:
        """Ids of a row, padding included, that a runner has read."""
        if not runner.use_cache or place >= len(runner.memo):
            return 0
        if isinstance(runner, RaggedRunner):
            padding = _padding(context, row)
            return padding + common_prefix(runner.memo[place], context.ids[row][padding:])
        return common_prefix(runner.memo[place], context.ids[row])


def _own(runner: ModelRunner | None, row: int) -> tuple[ModelRunner | None, int]:
    """The runner that holds a row, and its place there."""
    if isinstance(runner, SeparateRunner):
        return (runner.rows[row], 0) if row < len(runner.rows) else (None, 0)
    return runner, row


def _padding(context: Context, row: int) -> int:
    """Columns of a row's left padding."""
    mask = context.prompt.mask
    return 0 if mask is None else int((mask[row].cumsum(-1) == 0).sum())


def _of_rectangle(runner: Any, row: int, index: int, padding: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    layer = runner.cache.layers[index]
    first = runner.cache.length - len(runner.memo[row])  # rows end at the right edge
    return tuple(states[row : row + 1, :, first + padding : first + count] for states in (layer.keys, layer.values))


def _of_ragged(runner: Any, row: int, index: int, padding: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    layer = runner.ragged.ragged_layers[index]
    regions = layer.regions
    first, end = regions.bases[row], regions.place(row, count - padding)
    return tuple(states[:, :, first:end] for states in (layer.keys, layer.values))
