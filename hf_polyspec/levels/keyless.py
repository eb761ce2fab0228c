# SPDX-License-Identifier: Apache-2.0
"""An assistant that reads the keys and values of the level above (Gemma 4's) as the drafter below it.

transformers takes the likeliest token each time and hands up the logits as if it had been drawn, which biases sampled
text. Here each token is drawn as the text asks for, and handed up with the law it was drawn from.
"""

from __future__ import annotations

import torch

from ..defaults import DEFAULT_DRAFT_TOKENS
from ..eagle.configuration import LAST_HIDDEN_STATE
from ..exactness.context import Context
from ..host.columns import position_of
from ..host.keyless import Keyless
from ..host.shared_keys import Shared, SharedKeys
from .shown import CompanionDrafter, Draft, ShownRow

_TAIL = 64
"""Hidden states of a prompt that are kept: a draft goes on from one of the last."""


class KeylessDrafter(CompanionDrafter):
    """Drafts token by token beside what the level above has read.

    Args:
        drafter: the assistant, under the level above; name: shown in telemetry and errors.

    Attributes:
        keys: of the level above; given when the chain is built.
    """

    def __init__(self, drafter: Keyless, name: str) -> None:
        super().__init__(
            drafter.model, longest=DEFAULT_DRAFT_TOKENS, width=drafter.width, layers=[LAST_HIDDEN_STATE], name=name
        )
        self.drafter = drafter
        self.keys: SharedKeys | None = None
        self._shared: dict[int, tuple[Shared, int]] = {}  # by row, of the drafts under way, and their position

    def for_another(self) -> KeylessDrafter:
        return KeylessDrafter(self.drafter, self.name)

    def end(self) -> None:
        super().end()
        self.keys, self._shared = None, {}

    def keep(self, ids: list[int], states: torch.Tensor, row: ShownRow) -> None:
        super().keep(ids, states[-_TAIL:], row)

    def start(self, draft: Draft, row: ShownRow, context: Context, limit: int) -> None:
        assert self.keys is not None, "a chain tells which keys are read"
        padding = len(context.ids[draft.row]) - len(draft.text)
        shared, held = self.keys.read(draft.row, context, padding + draft.end)
        draft.end = min(draft.end, held - padding)
        if draft.end <= max(0, row.features.begin - padding):
            return
        draft.room = min(limit, self.draft_tokens)
        if draft.room > 0:
            draft.hidden = row.features.read(padding + draft.end - 1, padding + draft.end)
            position = position_of(context.prompt, draft.row, padding + draft.end)
            self._shared[draft.row] = self.drafter.taken(shared), position

    def say(self, draft: Draft, row: ShownRow, tokens: list[int]) -> torch.Tensor:
        shared, position = self._shared[draft.row]
        text = draft.text + tokens
        assert draft.hidden is not None
        for token in text[draft.end if not tokens else len(text) - 1 :]:
            logits, hidden = self.drafter.step(token, draft.hidden[-1], shared, position)
            draft.hidden = hidden[None]
            self.stats.forward_passes += 1
        return logits
