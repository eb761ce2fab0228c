# SPDX-License-Identifier: Apache-2.0
"""A block-diffusion drafter (DFlash) as the drafter below a model.

All places of a block are guessed at once, each without knowing what was drawn before it; tokens are drawn place by
place, and each is handed up with the law that it was drawn from. transformers drafts from the same laws, for one row,
and under the model alone whose hidden states are read.
"""

from __future__ import annotations

import torch

from ..exactness.context import Context, common_prefix
from ..host.dflash import DFlash
from .shown import CompanionDrafter, Draft, ShownRow


class DFlashDrafter(CompanionDrafter):
    """Drafts as many tokens as a block has places besides those that are known.

    Args:
        drafter: the model, under the level above; name: shown in telemetry and errors.
    """

    def __init__(self, drafter: DFlash, name: str) -> None:
        super().__init__(
            drafter.model, longest=drafter.block - 1, width=drafter.width, layers=drafter.layers, name=name
        )
        self.drafter = drafter
        self._said: dict[int, torch.Tensor] = {}  # `[K, V]` by row, of the drafts under way

    def for_another(self) -> DFlashDrafter:
        return DFlashDrafter(self.drafter, self.name)

    def end(self) -> None:
        super().end()
        self._said = {}

    def start(self, draft: Draft, row: ShownRow, context: Context, limit: int) -> None:
        draft.room = min(limit, self.draft_tokens, self.drafter.block - 1 - draft.late)
        if draft.room <= 0:
            return
        padding = len(context.ids[draft.row]) - len(draft.text)
        base = max(0, row.features.begin - padding)
        if row.cache is None or row.base != base:
            row.cache, row.base, row.read = self.drafter.new_cache(), base, []
        # What the cache holds of a position is made of the hidden states there, and so of all ids up to it.
        held = min(common_prefix(row.read, draft.text) - base, self.drafter.held(row.cache))
        keep = max(0, min(held, draft.end - base - 1))
        self.drafter.shrink(row.cache, keep)
        row.read = []  # nothing is certain until the pass went through
        features = row.features.read(padding + base + keep, padding + draft.end)
        self._said[draft.row] = self.drafter.say(features, draft.text[draft.end :], base + keep, row.cache)
        self.stats.forward_passes += 1
        row.read = draft.text[: draft.end]

    def say(self, draft: Draft, row: ShownRow, tokens: list[int]) -> torch.Tensor:
        return self._said[draft.row][len(tokens)]
