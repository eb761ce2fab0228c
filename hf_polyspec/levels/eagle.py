# SPDX-License-Identifier: Apache-2.0
"""An EAGLE head as the drafter: it reads the features of the level directly above and guesses what comes next."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..context import Context, Prompt
from ..distributions import LawMaker, fit_vocabulary
from ..eagle.features import select_features
from ..eagle.modeling import EagleHead
from ..errors import LevelError
from ..runner import Pass
from .base import Proposal, TreeProposal
from .eagle_memory import FeatureMemo, PairMemo, Pairs, left_mask
from .eagle_tree import Grown, grow
from .sequential import SequentialDrafter

_CHUNK = 1024


class EagleDrafter(SequentialDrafter):
    """Drafts a chain of tokens with an EAGLE head (arXiv 2401.15077, arXiv 2503.01840).

    At position i the head reads the feature of the level above and the token at i + 1, and guesses the token at
    i + 2; its own output is the feature of the next step. Where the level above has not read the last tokens itself (a
    token the target added), the head goes on from its own output. Before the first pass above it proposes nothing.

    When a row of a chain stops is decided in `SequentialDrafter`.

    Args:
        head: bound to the model of the level above.
        layers: the hidden states of that model that the head reads (`eagle.feature_layers`).
        name: shown in telemetry and errors.
        device: where laws are compared.
        draft_tokens: tokens a round (transformers' `num_assistant_tokens`).
        confidence_threshold: 0 to 1, 0 for never (transformers' `assistant_confidence_threshold`).
        schedule: see `SequentialDrafter`.
        eos: ids that end a text.
        tree_tokens, tree_depth, tree_top_k: size of the trees offered to a level that can check them; 0 tokens for
            none.
    """

    def __init__(
        self,
        head: EagleHead,
        layers: Sequence[int],
        *,
        name: str,
        device: torch.device,
        draft_tokens: int = 5,
        confidence_threshold: float = 0.0,
        schedule: str = "constant",
        eos: frozenset[int] = frozenset(),
        tree_tokens: int = 0,
        tree_depth: int = 5,
        tree_top_k: int = 4,
    ) -> None:
        super().__init__(
            name=name,
            draft_tokens=draft_tokens,
            confidence_threshold=confidence_threshold,
            schedule=schedule,
            eos=eos,
        )
        self.head = head
        self.layers = list(layers)
        self.device = device
        self.tree_tokens = tree_tokens
        self.tree_depth = tree_depth
        self.tree_top_k = tree_top_k
        self.chunk = _CHUNK
        self.features: list[FeatureMemo] = []
        self.pairs = PairMemo(head)
        self._columns: torch.Tensor | None = None
        self._prompt: Prompt | None = None
        self._padding: list[int] = []

    def begin(self, index: int, batch: int, vocabulary: int) -> None:
        super().begin(index, batch, vocabulary)
        self._columns = self.head.target_ids().to(self.device) if self.head.config.maps_vocabulary else None
        self._forget(batch)

    def end(self) -> None:
        self._forget(0)

    def watch(self, passed: Pass) -> None:
        with self.stats.timed():
            states = self.head.fuse(select_features(passed.output.hidden_states, self.layers))  # [B, F, H]
            for b, (memo, ids, row) in enumerate(zip(self.features, passed.read, states, strict=True)):
                columns = None if passed.kept is None else passed.kept[b]
                memo.store(ids, row[-min(passed.fed, len(ids)) :] if columns is None else row[columns])

    def prefill(self, context: Context, chunk: int) -> None:
        self.chunk = chunk

    def keep_rows(self, rows: list[int]) -> None:
        self.features = [self.features[row] for row in rows]
        self.pairs.keep_rows(rows)

    def propose(self, context: Context, limits: list[int], law: LawMaker) -> Proposal:
        rows = self._known_pairs(context)
        room = [min(limit, self.draft_tokens) if row.count else 0 for limit, row in zip(limits, rows, strict=True)]
        tokens: list[list[int]] = [[] for _ in rows]
        q = None
        if any(room):
            with self.stats.timed():
                q = self._draft(context, rows, tokens, room, law)
        self.stats.drafted += sum(len(row) for row in tokens)
        return Proposal(tokens, q, [[self.index] * len(row) for row in tokens])

    def propose_tree(self, context: Context, limits: list[int], law: LawMaker) -> TreeProposal | None:
        rows = self._known_pairs(context) if self.tree_tokens else []
        room = [min(limit, self.tree_depth) if row.count else 0 for limit, row in zip(limits, rows, strict=False)]
        if not any(room):
            return None
        with self.stats.timed():
            grown = self._grow(rows, room)
        self.stats.drafted += sum(len(nodes) for nodes in grown.tokens)
        return TreeProposal(grown.tokens, grown.parents, [[self.index] * len(nodes) for nodes in grown.tokens])

    def _forget(self, batch: int) -> None:
        self.features = [FeatureMemo() for _ in range(batch)]
        self.pairs = PairMemo(self.head)
        self._prompt, self._padding = None, []

    def _known_pairs(self, context: Context) -> list[Pairs]:
        """Per row, all pairs of this context whose features the level above has computed."""
        if context.prompt is not self._prompt:
            self._prompt, self._padding = context.prompt, _padding(context)
        rows = []
        for ids, memo, padding in zip(context.ids, self.features, self._padding, strict=True):
            end = min(memo.known(ids), len(ids) - 1)
            rows.append(Pairs(ids, max(memo.begin, padding), end, padding, memo))
        return rows

    def _draft(
        self, context: Context, rows: list[Pairs], tokens: list[list[int]], room: list[int], law: LawMaker
    ) -> torch.Tensor | None:
        """Fill `tokens`; returns q `[B, K, V]`, or None in the greedy limit.

        A row with tokens that the level above has not read (`late`) takes them in first, one a step, while other rows
        already draft: each step is one column for all rows.
        """
        hidden = self._catch_up(rows)
        late = [row.ids[row.end + 1 :] for row in rows]
        going = [places > 0 for places in room]
        laws: list[torch.Tensor | None] = []
        step = 0
        while any(going):
            drawing = [alive and step >= len(more) for alive, more in zip(going, late, strict=True)]
            laws.append(self.draw(context, tokens, self._logits(hidden), drawing, going, law) if any(drawing) else None)
            for b, places in enumerate(room):
                going[b] = going[b] and len(tokens[b]) < places
            if any(going):
                column = [_column(more, drawn, step) for more, drawn in zip(late, tokens, strict=True)]
                hidden = self._advance(rows, column, hidden, step)
            step += 1
        return _aligned(laws, [len(more) for more in late], tokens) if law.do_sample else None

    def _catch_up(self, rows: list[Pairs]) -> torch.Tensor:
        try:
            hidden, passes = self.pairs.catch_up(rows, self.chunk)
        except Exception as error:
            raise LevelError(f"the forward pass of {self.name} failed: {error}") from error
        self.stats.forward_passes += passes
        return hidden

    def _grow(self, rows: list[Pairs], room: list[int]) -> Grown:
        hidden = self._catch_up(rows)
        width = self.pairs.width
        seen = torch.arange(width)[None, :] >= torch.tensor(self.pairs.unused)[:, None]  # [B, S]
        # Rows with late tokens take them in first; the last of each row's goes into the last of these columns.
        late = [row.ids[row.end + 1 :] for row in rows]
        most = max(len(more) for more in late)
        for step in range(most):
            own = [step - most + len(more) for more in late]  # index of the row's late token, negative for none
            fresh = torch.tensor([place >= 0 for place in own])
            column = torch.tensor([[more[max(0, at)] if more else 0] for more, at in zip(late, own, strict=True)])
            places = torch.tensor([[max(0, r.end - r.padding + at)] for r, at in zip(rows, own, strict=True)])
            itself = torch.ones(len(rows), 1, dtype=torch.bool)
            out = self._step(column, hidden, places, torch.cat([seen, itself], dim=1)[:, None, None])
            hidden = torch.where(fresh.to(hidden.device)[:, None, None], out, hidden)
            seen = torch.cat([seen, fresh[:, None]], dim=1)
        first = torch.tensor([[max(0, len(row.ids) - 1 - row.padding)] for row in rows])

        def step_level(tokens: torch.Tensor, features: torch.Tensor, level: int, sees: torch.Tensor) -> torch.Tensor:
            before = seen[:, None].expand(-1, tokens.shape[1], -1).to(sees.device)
            places = (first + level - 1).expand(-1, tokens.shape[1])
            return self._step(tokens, features, places, torch.cat([before, sees], dim=2)[:, None])

        def score(states: torch.Tensor) -> torch.Tensor:
            return self._logits(states).log_softmax(-1)

        size = {"total": self.tree_tokens, "depth": self.tree_depth, "top_k": self.tree_top_k}
        return grow(hidden, room, score, step_level, **size)

    def _step(
        self, tokens: torch.Tensor, features: torch.Tensor, places: torch.Tensor, mask: torch.Tensor | None
    ) -> torch.Tensor:
        try:
            hidden = self.head.step(self.pairs.allowed(tokens), features, places, mask, self.pairs.cache)
        except Exception as error:
            raise LevelError(f"the forward pass of {self.name} failed: {error}") from error
        self.stats.forward_passes += 1
        return hidden

    def _advance(self, rows: list[Pairs], column: list[int], hidden: torch.Tensor, step: int) -> torch.Tensor:
        """One step of guessing: `[B, 1, H]` of the next position from this one's and the token after it."""
        positions = torch.tensor([[max(0, row.end - row.padding) + step] for row in rows])
        mask = left_mask(self.pairs.unused, self.pairs.cache.length + 1)
        return self._step(torch.tensor(column)[:, None], hidden, positions, mask)

    def _logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """The head's scores over the chain's ids, `[..., V]`; -inf where it has none."""
        logits = self.head.logits(hidden)
        logits = logits.to(device=self.device, dtype=torch.promote_types(logits.dtype, torch.float32))
        if self._columns is not None:
            known = self.head.config.vocab_size
            everything = logits.new_full((*logits.shape[:-1], known), float("-inf"))
            logits = everything.index_copy(-1, self._columns, logits)
        return fit_vocabulary(logits, self.vocabulary)


def _padding(context: Context) -> list[int]:
    """Per row, leading positions that have no token: left padding, or embeddings."""
    prompt = context.prompt
    if prompt.mask is None:
        return [prompt.hidden] * context.batch
    empty = (prompt.mask.cumsum(-1) == 0).sum(-1).tolist()
    return [max(prompt.hidden, int(columns)) for columns in empty]


def _column(late: list[int], drawn: list[int], step: int) -> int:
    """The token a row is fed at a step; rows that have stopped are fed anything."""
    if step < len(late):
        return late[step]
    return drawn[-1] if drawn else 0


def _aligned(laws: list[torch.Tensor | None], delays: list[int], tokens: list[list[int]]) -> torch.Tensor | None:
    """`[B, K, V]` from a law `[B, V]` a step; row b drew its first token at step `delays[b]`."""
    like = next((law for law in laws if law is not None), None)
    width = max(len(row) for row in tokens)
    if like is None or not width:
        return None
    stacked = torch.stack([torch.zeros_like(like) if law is None else law for law in laws], dim=1)  # [B, steps, V]
    if not any(delays):
        return stacked[:, :width]
    columns = torch.arange(width)[None, :] + torch.tensor(delays)[:, None]
    columns = columns.clamp(max=stacked.shape[1] - 1).to(stacked.device)
    return stacked.gather(1, columns[:, :, None].expand(-1, -1, stacked.shape[2]))
