# SPDX-License-Identifier: Apache-2.0
"""What a chain would have done with the recorded texts: every round of every level, its chance and its time.

Nothing is drawn. A round that starts at position t of a text emits k tokens with a probability that the records give
(`agreement`), so the mean number of rounds and their seconds follow by summing over starts, text by text. What the
text is like where a round starts is kept: drafters that do well in one place and badly in the next are not averaged
away, as a single acceptance rate would.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from ..host.lending import WORTH
from .agreement import DraftRecord, Flags, TreeSize
from .costs import ModelCosts
from .overheads import Overheads
from .readings import Array, survival, windows
from .texts import Text
from .theory.cost_model import SecondsTable


@dataclass(frozen=True)
class Chain:
    """A candidate: which levels, and their sizes.

    Attributes:
        levels: places in the full list, 0 (the target) first.
        block: tokens every middle collects; 0 without middles.
        draft: most tokens of a draft; 0 for plain decoding and trees.
        direct: from how many tokens on a draft passes the lowest middle by; 0 for never.
        tree: size of the trees, None for chains.
    """

    levels: tuple[int, ...]
    block: int = 0
    draft: int = 0
    tree: TreeSize | None = None
    direct: int = 0

    @property
    def plain(self) -> bool:
        """Whether this is plain generate()."""
        return len(self.levels) == 1


@dataclass
class Measurements:
    """Everything a prediction is made of.

    Attributes:
        names: of the levels, the target first.
        texts: what the target wrote.
        costs: of every level that is a causal LM, by place.
        edges: logs of chances along each text by (checking, offering) place, for levels that are causal LMs.
        drafts: by (checking, offering) place and tree size, for levels that only draft.
        overheads: time outside the levels.
        noise_seconds: of drawing the noise of a step, 0 in the greedy limit; plain generation's steps have it in them.
        bound: reasons why a level cannot stand under another, by (checking, offering) place.
        copies: places of models that take the prompt's keys and values from the target (see `lending`).
    """

    names: list[str]
    texts: list[Text]
    costs: dict[int, ModelCosts]
    edges: Mapping[tuple[int, int], list[Array]]
    drafts: Mapping[tuple[int, int, TreeSize | None], DraftRecord]
    overheads: Overheads
    noise_seconds: float = 0.0
    bound: dict[tuple[int, int], str] = field(default_factory=dict)
    copies: frozenset[int] = frozenset()
    _tables: dict[tuple[int, float], SecondsTable] = field(default_factory=dict, repr=False)

    def table(self, place: int, context: float) -> SecondsTable:
        """Seconds of a level's rounds at a context length; kept, since every candidate asks for it."""
        key = (place, context)
        if key not in self._tables:
            self._tables[key] = self.costs[place].table(context)
        return self._tables[key]

    def switch(self, place: int) -> float:
        """Seconds that a pass of a level takes longer right after one of another model."""
        return self.costs[place].switch if place in self.costs else 0.0

    @property
    def new_tokens(self) -> int:
        """Of all texts together."""
        return sum(len(text.new) for text in self.texts)

    @property
    def step_seconds(self) -> float:
        """Of a token of plain generate()."""
        return float(np.median([text.step_seconds for text in self.texts]))


@dataclass(frozen=True)
class Replayed:
    """A chain over all texts.

    Attributes:
        seconds: predicted wall time of the calls; tokens: new ones.
        by_level: seconds of each level's rounds, in the chain's order; the rest is prompts and overhead.
        rounds: of each level (the drafter: drafts).
        offered: mean tokens in the pass that checks, for each level but the drafter.
        tables: seconds of a pass of each level at that size (the drafter: of a draft).
    """

    seconds: float
    tokens: int
    by_level: tuple[float, ...]
    rounds: tuple[float, ...]
    offered: tuple[float, ...]
    tables: tuple[float, ...]

    @property
    def tokens_per_second(self) -> float:
        """New tokens per second of wall time."""
        return self.tokens / self.seconds

    @property
    def length(self) -> float:
        """Mean tokens the target emits a round."""
        return self.tokens / self.rounds[0]


@dataclass(frozen=True)
class _Rounds:
    """Rounds of one level by start, means: `law[t, k - 1]` emits k, `[N, levels]` seconds, passes and offered tokens.

    The arrays' columns follow the chain's levels; those above the level are 0.
    """

    law: Array
    seconds: Array
    passes: Array
    offered: Array


@dataclass(frozen=True)
class _Direct:
    """Drafts that pass the lowest middle by, by start.

    Attributes:
        passes: `[N]` whether one does; columns: `[N]` its tokens.
        kept: `[N, K]` P(at least i + 1 of them accepted) by the level above the middle.
        catching_up: `[N]` seconds that the middle reads longer next time, for what it has not seen.
    """

    passes: Flags
    columns: Array
    kept: Array
    catching_up: Array


def replay(chain: Chain, measured: Measurements) -> Replayed:
    """Predict a chain on the recorded texts.

    Args:
        chain: the candidate; measured: the records.

    Raises:
        KeyError: something of this chain was not measured.
    """
    if chain.plain:
        return _plain(measured)
    depth = len(chain.levels)
    totals = np.zeros((3, depth))
    undrafted = 0  # rounds of the target that read a prompt for others
    tables: list[SecondsTable] = []
    reading = 0.0
    for i, text in enumerate(measured.texts):
        context = len(text.prompt) + len(text.new) / 2
        tables = [measured.table(place, context) for place in chain.levels if place in measured.costs]
        rounds = _lowest(chain, measured, i, tables[depth - 2])
        direct = _direct(chain, measured, i, tables[depth - 2])
        for level in range(depth - 3, -1, -1):
            rounds = _collected(chain, measured, i, level, tables[level], rounds, direct)
            direct = None
        first = int(bool(_lent(chain, measured, text)))
        undrafted += first
        visits = _visits(rounds.law, first)
        totals += np.stack([visits @ rounds.seconds, visits @ rounds.passes, visits @ rounds.offered])
        reading += _reading(chain, measured, text, tables)
    seconds, passes, offered = totals
    overheads = measured.overheads
    below = sum(place in measured.costs for place in chain.levels[1:])
    outside = (overheads.call + overheads.per_model * below) * len(measured.texts) + overheads.per_round * (
        passes[0] + undrafted
    )
    outside += measured.noise_seconds * measured.new_tokens
    outside += overheads.per_block_round * float(passes[1:-1].sum())
    each = seconds / np.maximum(passes, 1e-9)
    return Replayed(
        float(seconds.sum()) + reading + outside,
        measured.new_tokens,
        tuple(seconds.tolist()),
        (float(passes[0]) + undrafted, *passes[1:].tolist()),
        tuple((offered / np.maximum(passes, 1e-9)).tolist()),
        tuple(each.tolist()),
    )


def _plain(measured: Measurements) -> Replayed:
    step = measured.step_seconds
    seconds = sum(text.first_seconds + step * (len(text.new) - 1) for text in measured.texts)
    tokens = measured.new_tokens
    return Replayed(seconds, tokens, (step * tokens,), (float(tokens),), (0.0,), (step,))


def _reading(chain: Chain, measured: Measurements, text: Text, tables: Sequence[SecondsTable]) -> float:
    """What the first pass of every model that reads the prompt takes more than a later one.

    A target that reads it for others drafts nothing for it.
    """
    models = [place for place in chain.levels if place in measured.costs]
    lent = _lent(chain, measured, text)
    total = 0.0
    for place, table in zip(models, tables, strict=False):
        if place not in lent:
            reading = measured.costs[place].reading(len(text.prompt))
            total += reading if lent and place == 0 else max(0.0, reading - table.seconds(1))
    return total


def _lent(chain: Chain, measured: Measurements, text: Text) -> frozenset[int]:
    """Models that take the prompt's keys and values from the target."""
    return measured.copies.intersection(chain.levels) if len(text.prompt) > WORTH else frozenset()


def _lowest(chain: Chain, measured: Measurements, i: int, table: SecondsTable) -> _Rounds:
    """Rounds of the level directly above the drafter."""
    above, drafter = chain.levels[-2:]
    depth, count = len(chain.levels), len(measured.texts[i].new)
    record = measured.drafts.get((above, drafter, chain.tree))
    if record is None:
        kept = survival(windows(measured.edges[above, drafter][i], chain.draft))
        columns = np.minimum(chain.draft, np.maximum(0, count - 1 - np.arange(count))).astype(float)
        drafting = measured.costs[drafter].drafting
        if drafting is None:
            raise ValueError(f"{measured.names[drafter]} was not timed as a drafter.")
    else:
        kept, columns = _recorded(record, chain, i)
        drafting = record.seconds
    law = _law(kept)
    seconds, passes, offered = (np.zeros((count, depth)) for _ in range(3))
    if record is not None and record.checking is not None:
        checking = np.where(columns > 0, record.checking, table.seconds(1))
    else:
        checking = _each(table, columns + 1)
    seconds[:, -2] = checking
    asked = columns > 0 if record is not None and chain.tree is not None else np.ones(count, dtype=np.bool_)
    seconds[:, -1] = np.where(asked, _each(drafting, columns), 0.0)
    if record is None:  # a model drafts: both come after the other
        seconds[:, -2] += np.where(columns > 0, measured.switch(above), 0.0)
        seconds[:, -1] += np.where(columns > 0, measured.switch(drafter), 0.0)
    passes[:, -2], passes[:, -1] = 1.0, asked
    offered[:, -2] = columns
    return _Rounds(law, seconds, passes, offered)


def _recorded(record: DraftRecord, chain: Chain, i: int) -> tuple[Array, Array]:
    """Survival `[N, K]` and tokens offered `[N]`; starts without a draft get the mean of those that have one."""
    width = chain.tree.depth if chain.tree is not None else chain.draft
    draft = record.drafts[i]
    kept = survival(draft.logs[:, :width])
    columns = draft.columns if chain.tree is not None else np.minimum(draft.columns, width)
    missing = ~draft.recorded
    if missing.any():
        everything = np.concatenate([survival(d.logs[d.recorded, :width]) for d in record.drafts])
        asked = np.concatenate([d.columns[d.recorded] for d in record.drafts])
        kept[missing] = everything.mean(axis=0)
        columns = np.where(
            missing, asked.mean() if chain.tree is not None else np.minimum(asked, width).mean(), columns
        )
    # The verifier's own token takes the last place of a text.
    count = len(draft.columns)
    kept = np.where(np.arange(width)[None, :] < (count - 1 - np.arange(count))[:, None], kept, 0.0)
    if record.blind_first:
        kept[0], columns = 0.0, np.concatenate([[0.0], columns[1:]])
    return kept, columns


def _direct(chain: Chain, measured: Measurements, i: int, middle: SecondsTable) -> _Direct | None:
    """What passes the lowest middle by, None where nothing can: drafts that nobody draws, in chains with a middle."""
    record = measured.drafts.get((chain.levels[-3], chain.levels[-1], None)) if len(chain.levels) > 2 else None
    if not chain.direct or chain.tree is not None or record is None or record.drawn:
        return None
    kept, columns = _recorded(record, chain, i)
    missed = kept.sum(1) if chain.levels[-2] not in measured.copies else np.zeros(len(kept))
    return _Direct(columns >= chain.direct, columns, kept, _each(middle, 1 + missed) - middle.seconds(1))


def _collected(
    chain: Chain,
    measured: Measurements,
    i: int,
    level: int,
    table: SecondsTable,
    below: _Rounds,
    direct: _Direct | None = None,
) -> _Rounds:
    """Rounds of a level over a middle that collects blocks (`theory.rounds.block_law`, start by start)."""
    count, most = below.law.shape
    threshold, depth = chain.block, len(chain.levels)
    reached = np.zeros((count, threshold + 1))
    reached[:, 0] = 1.0
    blocks = np.zeros((count, threshold + most))
    seconds, passes, offered = (np.zeros((count, depth)) for _ in range(3))
    pair = chain.levels[level], chain.levels[level + 1]
    kept = survival(windows(measured.edges[pair][i], blocks.shape[1] - 1))
    law = np.zeros_like(kept)
    for held in range(threshold):
        weight = reached[:, held]
        on = np.arange(count) + held < count - 1  # the text has room for more and for the verifier's own token
        blocks[:, held] += np.where(on, 0.0, weight)
        here = np.where(on, weight, 0.0)
        start = np.minimum(np.arange(count) + held, count - 1)
        if direct is not None:
            past = np.where(direct.passes[start], here, 0.0)
            here = here - past
            columns = held + direct.columns[start]
            seconds[:, level] += past * _each(table, columns + 1)
            seconds[:, level + 1] += past * direct.catching_up[start]
            seconds[:, -1] += past * below.seconds[start, -1]
            passes[:, -1] += past * below.passes[start, -1]
            offered[:, level] += past * columns
            law[:, :held] += past[:, None] * kept[:, :held]
            arrived = past * (kept[:, held - 1] if held else 1.0)
            law[:, held : held + direct.kept.shape[1]] += arrived[:, None] * direct.kept[start]
        if held == 0:  # the first pass of the middle comes after one of this level, and the other way round
            seconds[:, level] += here * measured.switch(pair[0])
            seconds[:, level + 1] += here * measured.switch(pair[1])
        seconds += here[:, None] * below.seconds[start]
        passes += here[:, None] * below.passes[start]
        offered += here[:, None] * below.offered[start]
        for k in range(1, most + 1):
            share = here * below.law[start, k - 1]
            if held + k >= threshold:
                blocks[:, held + k] += share
            else:
                reached[:, held + k] += share
    long_enough = np.cumsum(blocks[:, ::-1], axis=1)[:, ::-1][:, 1:]  # P(block >= i + 1)
    seconds[:, level] += blocks @ np.array([table.seconds(b + 1) for b in range(blocks.shape[1])])
    passes[:, level] = 1.0
    offered[:, level] += blocks @ np.arange(blocks.shape[1])
    return _Rounds(_law(law + kept * long_enough), seconds, passes, offered)


def _each(table: SecondsTable, tokens: Array) -> Array:
    """Seconds at each of many sizes, most of which are alike."""
    sizes, places = np.unique(tokens, return_inverse=True)
    return np.array([table.seconds(float(size)) for size in sizes])[places]


def _law(kept: Array) -> Array:
    """`[N, K + 1]`: P(k tokens emitted) from P(at least i + 1 accepted)."""
    count = kept.shape[0]
    ones, zeros = np.ones((count, 1)), np.zeros((count, 1))
    reached = np.concatenate([ones, kept, zeros], axis=1)
    return np.asarray(reached[:, :-1] - reached[:, 1:], dtype=np.float64)


def _visits(law: Array, first: int = 0) -> Array:
    """`[N]`: probability that a round starts at each position of a text from the first on."""
    count, most = law.shape
    visits = np.zeros(count + most)
    visits[first] = 1.0
    for start in range(first, count):
        visits[start + 1 : start + 1 + most] += visits[start] * law[start]
    return visits[:count]
