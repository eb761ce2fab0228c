# SPDX-License-Identifier: Apache-2.0
"""The multi-token-prediction layers of a model as the drafter below it, or below a copy of it.

As transformers drafts with them, but each token is drawn as the text asks for, in batches, and under a middle: where
the level above has not read the last tokens yet, layers read those first and draft with the rest.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from ..eagle.configuration import LAST_HIDDEN_STATE
from ..eagle.features import select_features
from ..exactness.context import Context, common_prefix
from ..exactness.distributions import LawMaker, fit_vocabulary
from ..exactness.passes import Pass
from ..exactness.proposal import Proposal
from ..host.mtp import MtpLayers
from .eagle_memory import FeatureMemo, padding_of
from .sequential import SequentialDrafter


@dataclass
class _Row:
    """What is kept of one row (law 4).

    Attributes:
        features: final hidden states of the level above.
        cache: of the layers; column c is position `base` + c of the row's text.
        read: ids that the layers were fed with, or were about to be.
    """

    features: FeatureMemo = field(default_factory=FeatureMemo)
    cache: Any = None
    base: int = 0
    read: list[int] = field(default_factory=list)


@dataclass
class _Draft:
    """One row in the making: its text, the hidden states `[N, H]` of its last N positions with known ones, which end
    before position `end`, and how many tokens it may get."""

    text: list[int]
    end: int
    room: int
    hidden: torch.Tensor | None = None
    laws: list[torch.Tensor] = field(default_factory=list)

    @property
    def late(self) -> int:
        """Tokens that the level above has not read, besides the last one."""
        return len(self.text) - 1 - self.end


class MtpDrafter(SequentialDrafter):
    """Drafts with one layer a token, as many tokens as there are layers.

    Args:
        layers: a model's; the level above hands up hidden states of that model, or of a copy of it.
        eos: ids that end a text.
    """

    def __init__(self, layers: MtpLayers, *, eos: frozenset[int] = frozenset()) -> None:
        super().__init__(name="mtp", draft_tokens=layers.count, confidence_threshold=0.0, schedule="constant", eos=eos)
        self.layers = layers
        self.reads_layers = [LAST_HIDDEN_STATE]
        self._rows: list[_Row] = []

    def for_another(self) -> MtpDrafter:
        return MtpDrafter(self.layers, eos=self.eos)

    def begin(self, index: int, batch: int, vocabulary: int) -> None:
        super().begin(index, batch, vocabulary)
        self._rows = [_Row() for _ in range(batch)]

    def end(self) -> None:
        super().end()
        self._rows = []

    def keep_rows(self, rows: list[int]) -> None:
        self._rows = [self._rows[row] for row in rows]

    def add_rows(self, count: int) -> None:
        self._rows = [*self._rows, *(_Row() for _ in range(count))]

    def watch(self, passed: Pass) -> None:
        states = select_features(passed.output.hidden_states, self.reads_layers)  # [B, F, H]
        if states.shape[-1] != self.layers.width:
            raise ValueError(
                f"mtp reads hidden states of width {self.layers.width}, and the level above it has "
                f"{states.shape[-1]}; put it under the target or a copy of it."
            )
        for b, (row, ids) in enumerate(zip(self._rows, passed.read, strict=True)):
            count = min(passed.fed_of(b), len(ids))
            row.features.store(
                ids, states[b, states.shape[1] - count :] if passed.kept is None else states[b, passed.kept[b]]
            )

    def propose(self, context: Context, limits: list[int], law: LawMaker) -> Proposal:
        tokens: list[list[int]] = [[] for _ in limits]
        with self.stats.timed():
            drafts = [
                self._begun(b, context.ids[b], pad, limit)
                for b, (pad, limit) in enumerate(zip(padding_of(context), limits, strict=True))
            ]
            going = [draft.room > 0 for draft in drafts]
            for layer in range(self.layers.count):
                self._layer(layer, context, drafts, tokens, going, law)
                if not any(going):
                    break
        for row, draft, new in zip(self._rows, drafts, tokens, strict=True):
            if draft.room > 0:
                row.read = draft.text + new
        self.stats.drafted += sum(len(row) for row in tokens)
        return Proposal(
            tokens, self._stacked(drafts) if law.draws else None, [[self.index] * len(row) for row in tokens]
        )

    def _begun(self, b: int, ids: list[int], padding: int, limit: int) -> _Draft:
        """A row's draft, its cache rolled back to what it shares with the text and still has to feed."""
        row, text = self._rows[b], ids[padding:]
        end = min(row.features.known(ids), len(ids) - 1) - padding
        base = max(0, row.features.begin - padding)
        draft = _Draft(text, end, 0)
        draft.room = min(limit, self.layers.count - draft.late) if end > base else 0
        if draft.room <= 0:
            return draft
        if row.cache is None or row.base != base:
            row.cache, row.base, row.read = self.layers.new_cache(), base, []
        count = range(self.layers.count)
        # The last layer reads the token that is as many places further on as there are layers.
        sure = common_prefix(row.read, text) - self.layers.count - base
        keep = max(0, min(sure, end - base - 1, *(self.layers.held(row.cache, layer) for layer in count)))
        for layer in count:
            self.layers.shrink(row.cache, layer, keep)
        draft.hidden = row.features.read(padding + base + keep, padding + end)
        return draft

    def _layer(
        self,
        layer: int,
        context: Context,
        drafts: list[_Draft],
        tokens: list[list[int]],
        going: list[bool],
        law: LawMaker,
    ) -> None:
        """Run one layer on every row that is still going, and draw a token where it speaks of an unknown one."""
        logits = torch.zeros(len(drafts), 1, self.vocabulary, device=law.device)
        drawing = [alive and layer >= draft.late for alive, draft in zip(going, drafts, strict=True)]
        for b, draft in enumerate(drafts):
            if not going[b] or draft.hidden is None:
                continue
            first = draft.end - len(draft.hidden) + layer + 1
            fed = (draft.text + tokens[b])[first : draft.end + layer + 1]
            draft.hidden = self.layers.step(layer, draft.hidden, fed, first, self._rows[b].cache)
            self.stats.forward_passes += 1
            if drawing[b]:
                said = self.layers.logits(draft.hidden[-1]).to(law.device)
                logits[b, 0] = fit_vocabulary(said, self.vocabulary)
        if not any(drawing):
            return
        before = [len(row) for row in tokens]
        q = self.draw(context, tokens, logits, drawing, going, law)
        for b, draft in enumerate(drafts):
            if len(tokens[b]) > before[b]:
                draft.laws.append(q[b])
            going[b] = going[b] and len(tokens[b]) < draft.room

    def _stacked(self, drafts: list[_Draft]) -> torch.Tensor | None:
        """`[B, K, V]`, the laws that tokens were drawn from."""
        width = max((len(draft.laws) for draft in drafts), default=0)
        if not width:
            return None
        like = next(law for draft in drafts for law in draft.laws)
        stacked = like.new_zeros(len(drafts), width, like.shape[0])
        for b, draft in enumerate(drafts):
            for place, law in enumerate(draft.laws):
                stacked[b, place] = law
        return stacked
