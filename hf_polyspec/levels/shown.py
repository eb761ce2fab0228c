# SPDX-License-Identifier: Apache-2.0
"""What drafters that go on from hidden states of the level above have in common, besides EAGLE heads.

Each row is run by itself. Where the level above has not read the last tokens of a text, a draft begins behind what it
has read, and its first tokens are those of the text: they are read and not drawn.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ..eagle.features import select_features
from ..exactness.context import Context
from ..exactness.distributions import LawMaker
from ..exactness.passes import Pass
from ..exactness.proposal import Proposal
from ..exactness.row_tensors import fit_vocabulary
from .eagle_memory import FeatureMemo, padding_of
from .sequential import SequentialDrafter


@dataclass
class ShownRow:
    """What is kept of one row (law 4).

    Attributes:
        features: hidden states of the level above.
        cache: the drafter's own; column c is position `base` + c of the row's text.
        read: ids that the cache was made of.
    """

    features: FeatureMemo = field(default_factory=FeatureMemo)
    cache: Any = None
    base: int = 0
    read: list[int] = field(default_factory=list)


@dataclass
class Draft:
    """One row in the making.

    Attributes:
        row: its place in the batch; text: its ids without padding.
        end: positions of the text with known hidden states end before this one.
        room: how many tokens it may get.
        hidden: `[N, H]`, where it goes on from.
        laws: `[V]` each, what its tokens were drawn from.
    """

    row: int
    text: list[int]
    end: int
    room: int = 0
    hidden: torch.Tensor | None = None
    laws: list[torch.Tensor] = field(default_factory=list)

    @property
    def late(self) -> int:
        """Tokens that the level above has not read, besides the last one."""
        return len(self.text) - 1 - self.end


class ShownDrafter(SequentialDrafter):
    """A drafter that is shown hidden states.

    Args:
        width: of the hidden states it reads, all layers side by side; layers: which, as `Drafter.reads_layers`.
        options: see `SequentialDrafter`.
    """

    def __init__(self, *, width: int, layers: Sequence[int], **options: Any) -> None:
        super().__init__(**options)
        self.width = width
        self.reads_layers = list(layers)
        self._rows: list[ShownRow] = []

    @abstractmethod
    def start(self, draft: Draft, row: ShownRow, context: Context, limit: int) -> None:
        """Say how many tokens a draft may get (`draft.room`, at most `limit`), and make it ready."""

    @abstractmethod
    def say(self, draft: Draft, row: ShownRow, tokens: list[int]) -> torch.Tensor:
        """`[V]`, logits of what follows a draft's text and the tokens it has got."""

    def finish(self, draft: Draft, row: ShownRow, tokens: list[int]) -> None:
        """A draft that had room has got all of its tokens."""

    def keep(self, ids: list[int], states: torch.Tensor, row: ShownRow) -> None:
        """Hidden states `[N, H]` of the last N of `ids`, as the level above has read them."""
        row.features.store(ids, states)

    def begin(self, index: int, batch: int, vocabulary: int) -> None:
        super().begin(index, batch, vocabulary)
        self._rows = [ShownRow() for _ in range(batch)]

    def end(self) -> None:
        super().end()
        self._rows = []

    def keep_rows(self, rows: list[int]) -> None:
        self._rows = [self._rows[row] for row in rows]

    def add_rows(self, count: int) -> None:
        self._rows = [*self._rows, *(ShownRow() for _ in range(count))]

    def watch(self, passed: Pass) -> None:
        states = select_features(passed.output.hidden_states, self.reads_layers)  # [B, F, H]
        if states.shape[-1] != self.width:
            raise ValueError(
                f"{self.name} reads hidden states of width {self.width}, and the level above it has "
                f"{states.shape[-1]}; put it under the target or a copy of it."
            )
        for b, (row, ids) in enumerate(zip(self._rows, passed.read, strict=True)):
            count = min(passed.fed_of(b), len(ids))
            self.keep(
                ids, states[b, states.shape[1] - count :] if passed.kept is None else states[b, passed.kept[b]], row
            )

    def propose(self, context: Context, limits: list[int], law: LawMaker) -> Proposal:
        tokens: list[list[int]] = [[] for _ in limits]
        with self.stats.timed():
            drafts = [
                self._started(b, pad, limit, context)
                for b, (pad, limit) in enumerate(zip(padding_of(context), limits, strict=True))
            ]
            going = [draft.room > 0 for draft in drafts]
            while any(going):
                self._draw(context, drafts, tokens, going, law)
            for row, draft, new in zip(self._rows, drafts, tokens, strict=True):
                if draft.room > 0:
                    self.finish(draft, row, new)
        self.stats.drafted += sum(len(row) for row in tokens)
        return Proposal(tokens, _stacked(drafts) if law.draws else None, [[self.index] * len(row) for row in tokens])

    def _started(self, b: int, padding: int, limit: int, context: Context) -> Draft:
        row, ids = self._rows[b], context.ids[b]
        draft = Draft(b, ids[padding:], min(row.features.known(ids), len(ids) - 1) - padding)
        # A feature that was made of a token that has gone, or of none, is not known.
        if draft.end > max(0, row.features.begin - padding):
            self.start(draft, row, context, limit)
        return draft

    def _draw(
        self, context: Context, drafts: list[Draft], tokens: list[list[int]], going: list[bool], law: LawMaker
    ) -> None:
        """A token for every row that is still going."""
        logits = torch.zeros(len(drafts), 1, self.vocabulary, device=law.device)
        for draft, row, new, alive in zip(drafts, self._rows, tokens, going, strict=True):
            if alive:
                said = self.say(draft, row, new).to(law.device)
                logits = logits.to(torch.promote_types(logits.dtype, said.dtype))
                logits[draft.row, 0] = fit_vocabulary(said, self.vocabulary)
        before = [len(row) for row in tokens]
        q = self.draw(context, tokens, logits, list(going), going, law)
        for b, draft in enumerate(drafts):
            if len(tokens[b]) > before[b]:
                draft.laws.append(q[b])
            going[b] = going[b] and len(tokens[b]) < draft.room


class CompanionDrafter(ShownDrafter):
    """A model of its own that drafts beside another one.

    It is made when a chain is read, before its options are: `settle` gives it those.

    Args:
        assistant: the model; longest: tokens of a draft where nobody says how many.
        shown: see `ShownDrafter`.
    """

    def __init__(self, assistant: Any, *, longest: int, width: int, layers: Sequence[int], name: str) -> None:
        super().__init__(
            width=width,
            layers=layers,
            name=name,
            draft_tokens=longest,
            confidence_threshold=0.0,
            schedule="constant",
            eos=frozenset(),
        )
        self.assistant = assistant
        self.longest = longest

    def settle(self, **options: Any) -> None:
        """Take a call's options, see `SequentialDrafter`."""
        SequentialDrafter.__init__(self, name=self.name, **options)


def _stacked(drafts: list[Draft]) -> torch.Tensor | None:
    """`[B, K, V]`, the laws that tokens were drawn from; None where no token was."""
    width = max((len(draft.laws) for draft in drafts), default=0)
    if not width:
        return None
    like = next(law for draft in drafts for law in draft.laws)
    stacked = like.new_zeros(len(drafts), width, like.shape[0])
    for b, draft in enumerate(drafts):
        for place, law in enumerate(draft.laws):
            stacked[b, place] = law
    return stacked
