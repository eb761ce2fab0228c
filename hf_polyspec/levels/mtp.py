# SPDX-License-Identifier: Apache-2.0
"""The multi-token-prediction layers of a model as the drafter below it, or below a copy of it.

As transformers drafts with them, but each token is drawn as the text asks for, in batches, and under a middle: where
the level above has not read the last tokens yet, layers read those first and draft with the rest.
"""

from __future__ import annotations

import torch

from ..eagle.configuration import LAST_HIDDEN_STATE
from ..exactness.context import Context, common_prefix
from ..host.mtp import MtpLayers
from .shown import Draft, ShownDrafter, ShownRow


class MtpDrafter(ShownDrafter):
    """Drafts with one layer a token, as many tokens as there are layers.

    Args:
        layers: a model's; the level above hands up hidden states of that model, or of a copy of it.
        eos: ids that end a text.
    """

    def __init__(self, layers: MtpLayers, *, eos: frozenset[int] = frozenset()) -> None:
        super().__init__(
            width=layers.width,
            layers=[LAST_HIDDEN_STATE],
            name="mtp",
            draft_tokens=layers.count,
            confidence_threshold=0.0,
            schedule="constant",
            eos=eos,
        )
        self.layers = layers

    def for_another(self) -> MtpDrafter:
        return MtpDrafter(self.layers, eos=self.eos)

    def start(self, draft: Draft, row: ShownRow, context: Context, limit: int) -> None:
        draft.room = min(limit, self.layers.count - draft.late)
        if draft.room <= 0:
            return
        padding = len(context.ids[draft.row]) - len(draft.text)
        base = max(0, row.features.begin - padding)
        if row.cache is None or row.base != base:
            row.cache, row.base, row.read = self.layers.new_cache(), base, []
        count = range(self.layers.count)
        # The last layer reads the token that is as many places further on as there are layers.
        sure = common_prefix(row.read, draft.text) - self.layers.count - base
        keep = max(0, min(sure, draft.end - base - 1, *(self.layers.held(row.cache, layer) for layer in count)))
        for layer in count:
            self.layers.shrink(row.cache, layer, keep)
        draft.hidden = row.features.read(padding + base + keep, padding + draft.end)

    def say(self, draft: Draft, row: ShownRow, tokens: list[int]) -> torch.Tensor:
        """The next layer, behind those that read what the level above has not."""
        text, last = draft.text + tokens, draft.late + len(tokens)
        for layer in range(0 if not tokens else last, last + 1):
            assert draft.hidden is not None
            first = draft.end - len(draft.hidden) + layer + 1
            fed = text[first : draft.end + layer + 1]
            draft.hidden = self.layers.step(layer, draft.hidden, fed, first, row.cache)
            self.stats.forward_passes += 1
        assert draft.hidden is not None
        return self.layers.logits(draft.hidden[-1])

    def finish(self, draft: Draft, row: ShownRow, tokens: list[int]) -> None:
        row.read = draft.text + tokens
