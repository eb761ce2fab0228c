# SPDX-License-Identifier: Apache-2.0
"""What an EAGLE head remembers between rounds: features of the level above, and its own keys and values.

Both are memos of ids (law 4): what still holds for a new context is found by comparing ids, never told by anyone.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..eagle.head_cache import HeadCache
from ..eagle.head_steps import HeadSteps
from ..eagle.modeling import EagleHead
from ..exactness.context import Context, common_prefix
from ..exactness.passes import Pass

_ROOM = 256


class FeatureMemo:
    """Fused features of one row, one a position, in a buffer that grows; positions before `begin` have none.

    Attributes:
        ids: the ids that the features were computed from; feature i depends on `ids[: i + 1]`.
        begin: first position with a feature.
    """

    def __init__(self) -> None:
        self.ids: list[int] = []
        self.begin = 0
        self._states: torch.Tensor | None = None

    def store(self, ids: list[int], states: torch.Tensor) -> None:
        """The level above has read `ids`, its last N with a pass that gave `states`, `[N, H]`."""
        first = len(ids) - states.shape[0]
        joined = self.begin <= first <= len(self.ids) and self.ids[:first] == ids[:first]
        if not joined:
            self.begin = first
        start = first - self.begin
        end = start + states.shape[0]
        if self._states is None or self._states.shape[0] < end:
            larger = states.new_empty(end + end // 2 + _ROOM, states.shape[1])
            if self._states is not None and start:
                larger[:start] = self._states[:start]
            self._states = larger
        self._states[start:end] = states
        self.ids = ids

    def known(self, ids: list[int]) -> int:
        """Features of positions `begin` to this number, exclusive, hold for these ids."""
        return common_prefix(self.ids, ids)

    def read(self, first: int, end: int) -> torch.Tensor:
        """Features of positions `first` to `end`, exclusive: `[end - first, H]`."""
        assert self._states is not None
        return self._states[first - self.begin : end - self.begin]


def own_columns(passed: Pass, states: torch.Tensor) -> list[torch.Tensor]:
    """Of states `[B, F, H]` of a pass those that its rows were fed, and of trees what stays: `[N, H]` a row."""
    if passed.kept is not None:
        return [row[kept] for row, kept in zip(states, passed.kept, strict=True)]
    counts = [min(passed.fed_of(b), len(ids)) for b, ids in enumerate(passed.read)]
    return [row[len(row) - count :] for row, count in zip(states, counts, strict=True)]


@dataclass(frozen=True)
class Pairs:
    """Consecutive pairs of one row: pair i is the feature of position i with the token of position i + 1.

    Attributes:
        ids: the row's ids; those up to position `end` matter.
        begin, end: pairs `begin` to `end`, exclusive.
        padding: positions of the row that are not text; position ids count from there.
        features: where the features are.
    """

    ids: list[int]
    begin: int
    end: int
    padding: int
    features: FeatureMemo

    @property
    def count(self) -> int:
        return max(0, self.end - self.begin)

    @property
    def late(self) -> list[int]:
        """Tokens that come after the pairs, which the level above has not read; none of a row without pairs."""
        return self.ids[self.end + 1 :] if self.count else []

    def shared(self, other: Pairs) -> int:
        """Number of leading pairs that both have."""
        if self.begin != other.begin or not self.count or not other.count:
            return 0
        same = common_prefix(self.ids, other.ids) - 1
        return max(0, min(same, self.end, other.end) - self.begin)


def padding_of(context: Context) -> list[int]:
    """Per row, leading positions that have no token: left padding, or embeddings."""
    prompt = context.prompt
    if prompt.mask is None:
        return [prompt.hidden] * context.batch
    empty = (prompt.mask.cumsum(-1) == 0).sum(-1).tolist()
    return [max(prompt.hidden, int(columns)) for columns in empty]


class PairMemo:
    """A head's keys and values of all pairs with true features, rows of different length aligned to the right.

    Args:
        head: a bound head.

    Attributes:
        step: the head's steps over the cache, from one `catch_up` to the next.
    """

    def __init__(self, head: EagleHead) -> None:
        self.head = head
        self.cache: HeadCache = head.new_cache()
        self.step = HeadSteps(head, self.cache)
        self.width = 0
        self.rows: list[Pairs] = []

    @property
    def unused(self) -> list[int]:
        """Columns at the left of each row that hold nothing of it."""
        return [self.width - row.count for row in self.rows]

    def catch_up(self, rows: list[Pairs], chunk: int) -> tuple[torch.Tensor, int]:
        """Feed what the cache lacks of these pairs, and drop what else it holds.

        Args:
            rows: per row, all pairs with true features; at least one row has some.
            chunk: most columns fed at once.

        Returns:
            `[B, 1, H]`, the head's output at each row's last pair, and the number of forward passes.
        """
        kept, fed = self._plan(rows)
        past = self._roll_back(kept)
        self.step = HeadSteps(self.head, self.cache)
        self.rows, self.width = [], 0  # nothing is certain until every piece went through
        tokens, features, positions = self._inputs(rows, fed)
        unused = [past + fed - row.count for row in rows]
        mask = left_mask(unused, past + fed)
        passes, hidden = 0, features
        for start in range(0, fed, chunk):
            end = min(fed, start + chunk)
            seen = None if mask is None else mask[:, : past + end]
            hidden = self.step(tokens[:, start:end], features[:, start:end], positions[:, start:end], seen)
            passes += 1
        self.rows, self.width = rows, past + fed
        return hidden[:, -1:], passes

    def take_in(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, int]:
        """Run the late tokens of the rows last caught up with; the last of each row's goes into the last of columns.

        Args:
            hidden: `[B, 1, H]`, from `catch_up`.

        Returns:
            The head's output after each context, `[B, 1, H]`, which columns of the cache belong to it, `[B, S]`, and
            the number of forward passes.
        """
        rows = self.rows
        seen = torch.arange(self.width)[None, :] >= torch.tensor(self.unused)[:, None]  # [B, S]
        late = [row.late for row in rows]
        most = max(len(more) for more in late)
        for step in range(most):
            own = [step - most + len(more) for more in late]  # index of the row's late token, negative for none
            fresh = torch.tensor([place >= 0 for place in own])
            column = torch.tensor([[more[max(0, at)] if more else 0] for more, at in zip(late, own, strict=True)])
            places = torch.tensor([[max(0, r.end - r.padding + at)] for r, at in zip(rows, own, strict=True)])
            itself = torch.ones(len(rows), 1, dtype=torch.bool)
            out = self.step(self.allowed(column), hidden, places, torch.cat([seen, itself], dim=1)[:, None, None])
            hidden = torch.where(fresh.to(hidden.device)[:, None, None], out, hidden)
            seen = torch.cat([seen, fresh[:, None]], dim=1)
        return hidden, seen, most

    def keep_rows(self, rows: list[int]) -> None:
        """Only these rows go on."""
        if self.rows:
            self.cache.crop(self.width)
            self.cache.select_rows(torch.tensor(rows))
            self.rows = [self.rows[row] for row in rows]

    def add_rows(self, count: int) -> None:
        """So many rows join, of which no pairs are held."""
        if self.rows:
            self.cache.crop(self.width)
            self.cache.add_rows(count)
            self.rows = [*self.rows, *(Pairs([], 0, 0, 0, FeatureMemo()) for _ in range(count))]

    def _plan(self, rows: list[Pairs]) -> tuple[list[int], int]:
        """Pairs each row keeps, and columns F all rows feed; the last pair is always fed, for its output."""
        held = [old.shared(new) for old, new in zip(self.rows, rows, strict=True)] if self.rows else [0] * len(rows)
        missing = [max(1, row.count - have) if row.count else 0 for row, have in zip(rows, held, strict=True)]
        fed = max(missing)
        return [max(0, row.count - fed) for row in rows], fed

    def _roll_back(self, kept: list[int]) -> int:
        """Drop the end of each row and push the rest to the right edge; returns the columns left."""
        width = max(kept)
        if not self.rows or width == 0:
            self.cache = self.head.new_cache()
            return 0
        self.cache.crop(self.width)
        shifts = [(self.width - row.count) - (width - keep) for row, keep in zip(self.rows, kept, strict=True)]
        if any(shifts):
            columns = torch.arange(width)[None, :] + torch.tensor(shifts)[:, None]  # [B, S']
            self.cache.gather(columns.clamp(0, self.width - 1))
        else:
            self.cache.crop(width)
        return width

    def _inputs(self, rows: list[Pairs], fed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Tokens `[B, F]`, features `[B, F, H]` and positions `[B, F]`; zeros where a row has nothing to feed."""
        tokens = torch.zeros(len(rows), fed, dtype=torch.long)
        positions = torch.zeros(len(rows), fed, dtype=torch.long)
        size = self.head.config.hidden_size
        features = torch.zeros(len(rows), fed, size, device=self.head.device, dtype=self.head.dtype)
        for b, row in enumerate(rows):
            count = min(fed, row.count)
            if not count:
                continue
            first = row.end - count
            tokens[b, -count:] = torch.tensor(row.ids[first + 1 : row.end + 1])
            positions[b, -count:] = torch.arange(first - row.padding, row.end - row.padding)
            features[b, -count:] = row.features.read(first, row.end)
        return self.allowed(tokens), features, positions

    def allowed(self, tokens: torch.Tensor) -> torch.Tensor:
        """Ids that the head's embedding has; others become some id that it has, which can only cost acceptance."""
        return tokens.clamp(0, self.head.config.vocab_size - 1)


def left_mask(unused: list[int], width: int) -> torch.Tensor | None:
    """`[B, S]` with zeros in the unused columns at the left, or None if there are none."""
    if not any(unused):
        return None
    return (torch.arange(width)[None, :] >= torch.tensor(unused)[:, None]).long()
