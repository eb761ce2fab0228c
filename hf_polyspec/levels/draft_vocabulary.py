# SPDX-License-Identifier: Apache-2.0
"""Which ids an EAGLE head scores: all it knows, or a working set of them that follows the text.

At the size of a draft head most of a step is the product with the lm_head. A slice of its rows costs a fraction of
that; ids outside the slice are never proposed, which costs acceptance and nothing else.
"""

from __future__ import annotations

import itertools
from collections.abc import Container, Iterable
from typing import Literal

import torch

from ..cpu.row_scores import RowScores
from ..cpu.score_task import Norm, ScoreTask
from ..eagle.attention import plain_norm
from ..eagle.configuration import EagleHeadConfig
from ..eagle.modeling import EagleHead
from ..eagle.vocabulary import SLICES, VocabularySlice, lm_head_logits, lm_head_pieces
from ..exactness.processors import DraftVocabularyProcessor
from ..exactness.row_tensors import fit_vocabulary

AUTO_ROWS = 4096
"""Rows that "auto" asks for, where the head knows at least twice as many."""

RECENT = 512
"""Ids seen lately that are kept besides the chosen ones and those of the prompt."""


class WorkingVocabulary:
    """The ids a head scores during one generation.

    With a size, these are the ids that end a text, special ids, the most frequent ids of the target's own texts
    (`config.frequent_tokens`; without them the lowest ids, the oldest merges of a byte-pair vocabulary); then, on top
    of the size, all ids of the prompt and the last `RECENT` others that were `seen`. Rows of the lm_head are copied
    when an id joins, never in a draft step.

    Args:
        head: a bound head.
        vocabulary: columns V of the chain's laws; ids beyond are never scored.
        device: where scores are wanted.
        size: ids chosen beforehand; "auto" for `AUTO_ROWS` where that is at most half; None for that where the head's
            config ranks its ids (`frequent_tokens`), and for all it knows elsewhere.
        always: ids that are scored whatever the size, where the head knows them.

    Attributes:
        note: why a size that was asked for is not used, else None.
    """

    def __init__(
        self,
        head: EagleHead,
        vocabulary: int,
        device: torch.device,
        size: int | Literal["auto"] | None = None,
        always: Iterable[int] = (),
    ) -> None:
        self.head = head
        self.vocabulary = vocabulary
        self.device = device
        self.note: str | None = None
        config = head.config  # whether scores are those of a norm and some rows
        plain = config.own_lm_head or head.borrowed.is_plain
        self._simple = bool(plain and config.final_norm and not config.norm_output)
        self._rows: GrowingSlice | None = None
        known = head.target_ids() if head.config.maps_vocabulary else None
        self._usable: torch.Tensor | None = None  # columns of ids that the chain knows, None for all
        if known is not None and bool((known >= vocabulary).any()):
            self._usable = (known < vocabulary).nonzero().flatten()
            known = known[self._usable]
        self._ids = None if known is None else known.to(device)
        self._columns: dict[int, int] | None = None  # of a head's own ids, none of which join or leave
        count = min(vocabulary, head.config.vocab_size) if known is None else len(known)
        if size is None and head.config.frequent_tokens:
            size = "auto"
        wanted = (AUTO_ROWS if count >= 2 * AUTO_ROWS else count) if size == "auto" else (size or count)
        if wanted < count:
            self._slice(known, wanted, always)

    @property
    def sliced(self) -> bool:
        """Whether only some of the head's ids are scored."""
        return self._rows is not None

    @property
    def size(self) -> int:
        """Number of ids scored at present."""
        if self._ids is not None:
            return len(self._ids)
        return min(self.vocabulary, self.head.config.vocab_size)

    @property
    def target_ids(self) -> torch.Tensor:
        """`[N]`, the ids scored at present."""
        return torch.arange(self.size, device=self.device) if self._ids is None else self._ids

    def restriction(self) -> DraftVocabularyProcessor:
        """The processor that restricts full scores to the ids scored at present."""
        return DraftVocabularyProcessor(self.target_ids.tolist())

    def pin(self, ids: Iterable[int]) -> None:
        """Ids that are scored from now on to the end: a prompt's."""
        self._refresh(self._rows is not None and self._rows.pin(ids))

    def see(self, ids: Iterable[int]) -> None:
        """Ids that look likely at present; they are scored until `RECENT` others have come."""
        self._refresh(self._rows is not None and self._rows.see(ids))

    def score(self, hidden: torch.Tensor) -> torch.Tensor:
        """`[..., H]` -> raw logits `[..., N]` of the ids scored at present, float32 or wider, on the chain's device."""
        logits = self.head.logits(hidden, self._rows)
        logits = logits.to(device=self.device, dtype=torch.promote_types(logits.dtype, torch.float32))
        if self._usable is not None and self._rows is None:
            return logits.index_select(-1, self._usable.to(logits.device))
        return logits if self._ids is not None else logits[..., : self.vocabulary]

    def pieces(self, hidden: torch.Tensor) -> list[torch.Tensor] | None:
        """The same side by side, `[..., N1]` and perhaps `[..., N2]`, as the head's rows give them.

        Returns:
            None where columns that they have are not scored.
        """
        if self._rows is not None:
            return lm_head_pieces(self.head, self.head.normed(hidden), self._rows.pieces)
        whole = self.size == self.head.config.draft_vocab_size
        return [self.head.logits(hidden)] if self._usable is None and whole else None

    def task(self, states: torch.Tensor, count: int) -> ScoreTask | None:
        """What finds the `count` likeliest after states `[B, n, H]` at once, None where that is not so simple."""
        if self._rows is None or not self._simple:
            return None
        norm = plain_norm(self.head.norm)
        return None if norm is None else self._rows.task(states, norm, count)

    def columns_of(self, tokens: Iterable[int]) -> list[int | None]:
        """The column that each id is scored in at present, None for those that are not."""
        if self._rows is not None:
            return self._rows.columns_of(tokens)
        if self._ids is None:
            return [token if token < self.size else None for token in tokens]
        if self._columns is None:
            self._columns = {token: column for column, token in enumerate(self._ids.tolist())}
        return [self._columns.get(token) for token in tokens]

    def likeliest(self, final: torch.Tensor) -> torch.Tensor | None:
        """What the level above holds likeliest among the ids scored at present.

        Args:
            final: `[..., H]`, states that its lm_head reads.

        Returns:
            Ids `[...]`; None where all ids are scored, which would cost too much, or the head scores by rows of its
            own.
        """
        if self._rows is None or self._ids is None or self.head.config.own_lm_head:
            return None
        final = final.to(self.head.device, self.head.dtype)
        return self._ids[lm_head_logits(self.head, final, self._rows).argmax(-1).to(self.device)]

    def spread(self, scored: torch.Tensor) -> torch.Tensor:
        """Logits `[..., N]` of the ids scored at present -> over the chain's ids, `[..., V]`; -inf for the others."""
        if self._ids is None:
            return fit_vocabulary(scored, self.vocabulary)
        everything = scored.new_full((*scored.shape[:-1], self.vocabulary), float("-inf"))
        return everything.index_copy_(-1, self._ids, scored)

    def best(self, scored: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The likeliest of the ids scored at present: log-probabilities and ids, each `[..., min(count, N)]`."""
        values, columns = scored.topk(min(count, scored.shape[-1]), dim=-1)
        log_p = values - scored.logsumexp(-1, keepdim=True)
        return log_p, columns if self._ids is None else self._ids[columns]

    def _slice(self, known: torch.Tensor | None, wanted: int, always: Iterable[int]) -> None:
        head, config = self.head, self.head.config
        scored = range(min(self.vocabulary, config.vocab_size)) if known is None else known.tolist()
        members: Container[int] = scored if known is None else frozenset(scored)
        chosen: dict[int, None] = {}
        for token in itertools.chain(always, special_ids(config), config.frequent_tokens or (), scored):
            if token in members:
                chosen[token] = None
                if len(chosen) == wanted:
                    break
        try:
            fixed = SLICES.slice(head, torch.tensor(sorted(chosen), device=head.device))
        except ValueError as error:
            self.note = f"all {len(scored)} ids are drafted from: {error}"
            return
        self._rows = GrowingSlice(head, fixed, members, set(chosen))
        self._ids = fixed.target_ids.to(self.device)

    def _refresh(self, joined: bool) -> None:
        if joined and self._rows is not None:
            self._ids = self._rows.target_ids.to(self.device)


class GrowingSlice:
    """A fixed slice of a head's ids, and some that join later in a buffer of their own.

    Args:
        head: a bound head.
        fixed: rows that never change, possibly shared with other slices.
        members: ids the head can score.
        held: ids of the fixed slice.
    """

    def __init__(self, head: EagleHead, fixed: VocabularySlice, members: Container[int], held: set[int]) -> None:
        self.head = head
        self.fixed = fixed
        self._members = members
        self._held = held  # the fixed ids and all that have joined
        self.target_ids = fixed.target_ids
        self._joined: list[int] = []
        self._pinned = 0
        self._next = 0  # place in the ring behind the pinned ones that the next id takes
        self._rows: RowScores | None = None
        self._places: dict[int, int] | None = None  # columns of those that have joined
        self._tasks: dict[tuple[int, int], ScoreTask] = {}

    def pin(self, ids: Iterable[int]) -> bool:
        """Have ids join for good; says whether any did. What was `seen` before is forgotten."""
        recent = set(self._joined[self._pinned :])
        new = self._new(ids, recent)
        if new:
            kept = [*self._joined[: self._pinned], *new]
            rows = self.head.vocabulary_slice(torch.tensor(kept, device=self.head.device))
            self._joined, self._pinned, self._next = kept, len(kept), 0
            self._rows = _buffer(rows, len(kept) + RECENT)
            self._rows.put(list(range(len(kept))), rows.weight, rows.bias)
            self._held = (self._held - recent) | set(new)
            self._list()
        return bool(new)

    def see(self, ids: Iterable[int]) -> bool:
        """Have ids join until `RECENT` others have; says whether any did."""
        new = self._new(ids)[:RECENT]
        if new:
            rows = self.head.vocabulary_slice(torch.tensor(new, device=self.head.device))
            if self._rows is None:
                self._rows = _buffer(rows, RECENT)
            places = [self._pinned + (self._next + i) % RECENT for i in range(len(new))]
            self._next = (self._next + len(new)) % RECENT
            self._joined += [-1] * (max(places) + 1 - len(self._joined))
            for place, token in zip(places, new, strict=True):
                self._held.discard(self._joined[place])
                self._held.add(token)
                self._joined[place] = token
            self._rows.put(places, rows.weight, rows.bias)
            self._list()
        return bool(new)

    def score(self, hidden: torch.Tensor) -> torch.Tensor:
        """`[..., H]` -> `[..., N]`, one column for each of `target_ids`."""
        pieces = self.pieces(hidden)
        return torch.cat(pieces, dim=-1) if len(pieces) > 1 else pieces[0]

    def pieces(self, hidden: torch.Tensor) -> list[torch.Tensor]:
        """The same of the fixed rows, and of those that have joined, if any have."""
        scores, count = self.fixed.score(hidden), len(self._joined)
        return [scores] if not count or self._rows is None else [scores, self._rows.score(hidden, count)]

    def task(self, states: torch.Tensor, norm: Norm, count: int) -> ScoreTask | None:
        """What finds the likeliest after such states by compiled products, None where torch multiplies.

        Args:
            states: `[B, n, H]`; norm: of them; count: of the likeliest.
        """
        nodes, joined = states.shape[0] * states.shape[1], len(self._joined)
        fixed = self.fixed.rows.product(states, len(self.fixed))
        rows = self._rows if joined else None
        more = None if rows is None else rows.product(states, joined)
        if fixed is None or (rows is not None and more is None):
            return None
        room = 0 if self._rows is None else len(self._rows.weight)
        made_of = (norm[0].data_ptr(), norm[1], id(fixed), room, torch.get_num_threads())
        found = self._tasks.get((nodes, count))
        if found is None or found.made_of != made_of:
            found = self._tasks[nodes, count] = ScoreTask(nodes, count, norm, fixed, room)
        found.join(more)
        return found

    def columns_of(self, tokens: Iterable[int]) -> list[int | None]:
        """The column of each id, None for those that are not held."""
        if self._places is None:
            first = len(self.fixed)
            self._places = {token: first + place for place, token in enumerate(self._joined)}
        fixed, joined = self.fixed.columns, self._places
        return [fixed.get(token, joined.get(token)) for token in tokens]

    def _new(self, ids: Iterable[int], besides: Container[int] = ()) -> list[int]:
        """Those of the ids that may join: not held, or only among `besides`."""
        wanted = dict.fromkeys(ids)
        return [t for t in wanted if (t not in self._held or t in besides) and t in self._members]

    def _list(self) -> None:
        joined = torch.tensor(self._joined, dtype=torch.long, device=self.fixed.target_ids.device)
        self.target_ids = torch.cat([self.fixed.target_ids, joined])
        self._places = None


def _buffer(rows: VocabularySlice, count: int) -> RowScores:
    """Room for so many rows like these; zeros, since what was there before could be no numbers."""
    bias = None if rows.bias is None else rows.bias.new_zeros(count)
    return RowScores(rows.weight.new_zeros(count, rows.weight.shape[1]), bias)


def special_ids(config: EagleHeadConfig) -> list[int]:
    """Begin, end and padding ids that a head's config names."""
    found: list[int] = []
    for value in (config.eos_token_id, config.bos_token_id, config.pad_token_id):
        found += value if isinstance(value, list) else [] if value is None else [value]
    return found
