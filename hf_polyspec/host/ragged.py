# SPDX-License-Identifier: Apache-2.0
"""A runner whose rows are their own: no column is computed for another row's length (law 7).

Each row owns a region of the cache, and one pass `[1, N]` reads the new columns of all rows, one row's behind the
other's, with a position each. A row that has nothing to say takes no column; one that is rolled back forgets a number.

How a row joins while others run: append its ids to the context (`Prompt.apart` needs no padding) and call `add_rows`,
after which its memo is empty; the next pass that asks for it reads it beside the columns of the others. How it leaves:
`keep_rows` with the others; its region is free from then on. A row that is to wait is left out of `asked`. Memos hold
the ids of a row's own, without padding, so neither the width of the prompt nor the place of a row in the batch means
anything to them. Memory is that of the regions: a row's is half as large again as what it held when it last grew.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from ..errors import level_failures
from ..exactness.context import Context, Prompt, common_prefix
from ..exactness.passes import Pass
from ..exactness.row_tensors import RowTensors
from ..telemetry.counters import LevelStats
from .cache import RollbackCache
from .lending import WORTH
from .ragged_cache import RaggedCache
from .row_readings import Padded, Reading, Spread, groups_of, once, places_of
from .runner import ModelRunner
from .span import Span
from .spans import spanned
from .trees import ancestors

if TYPE_CHECKING:
    from ..exactness.proposal import TreeProposal


class RaggedRunner(ModelRunner):
    """A `ModelRunner` that feeds every row its own columns and nothing else.

    For models that go through transformers' attention interface, see `ragged_rows`.

    Args:
        model, name, device, options: see `ModelRunner`; prompts have ids, and no row's arguments are its own.
        rows: of the batch.
    """

    own_rows = True

    def __init__(self, model: Any, name: str, device: torch.device | None = None, *, rows: int, **options: Any) -> None:
        super().__init__(model, name, device, **options)
        self.ragged = RaggedCache(rows, model)
        self.memo: list[list[int]] = [[] for _ in range(rows)]
        self._pads: tuple[Prompt | None, list[int]] = (None, [])

    def padding(self, prompt: Prompt) -> list[int]:
        """Columns of left padding of each row."""
        known, found = self._pads
        if known is not prompt:
            mask = torch.ones_like(prompt.positions) if prompt.mask is None else prompt.mask
            found = [int(empty) for empty in (mask.cumsum(-1) == 0).sum(-1).tolist()]
            self._pads = prompt, found
        return found

    def own(self, context: Context) -> list[list[int]]:
        """The ids of each row, without padding."""
        pads = self.padding(context.prompt)
        return [ids[left:] if left else ids for ids, left in zip(context.ids, pads, strict=True)]

    def lacks(self, context: Context) -> list[int]:
        left = self.padding(context.prompt)
        return [len(ids) - pad - len(have) for ids, pad, have in zip(context.ids, left, self.memo, strict=True)]

    def can_read(self, context: Context) -> bool:
        return all(self.own(context)) and super().can_read(context)

    def add_rows(self, count: int) -> None:
        self.ragged.add_rows(count)
        self.memo = [*self.memo, *([] for _ in range(count))]

    def run(self, context: Context, drafts: list[list[int]], stats: LevelStats, *, columns: int = 0) -> Pass:
        """As `ModelRunner.run`; rows that are not `asked` are fed nothing, and their logits mean nothing.

        Raises:
            LevelError: the model raised; nothing is left in the cache.
        """
        asked, self.asked = self.asked, None
        own = self._known(context, stats, asked)
        readings = []
        for row, (ids, draft) in enumerate(zip(own, drafts, strict=True)):
            whole = ids + draft
            if not whole or not (asked is None or asked[row]):
                continue
            wanted = min(len(whole), max(1 + len(draft), columns))
            readings.append(self._reading(row, whole, wanted, []))
        return self._read(context, readings, [1 + len(draft) for draft in drafts], stats)

    def run_tree(self, context: Context, tree: TreeProposal, stats: LevelStats) -> Pass:
        """As `ModelRunner.run_tree`."""
        asked, self.asked = self.asked, None
        own = self._known(context, stats, asked)
        readings = [
            self._reading(row, ids + nodes, 1 + len(nodes), parents)
            for row, (ids, nodes, parents) in enumerate(zip(own, tree.tokens, tree.parents, strict=True))
            if asked is None or asked[row]
        ]
        passed = self._read(context, readings, [1 + len(nodes) for nodes in tree.tokens], stats)
        for reading in readings:  # which nodes stay is not known yet
            self.memo[reading.row] = own[reading.row]
        return passed

    def keep_paths(self, passed: Pass, context: Context, tree: TreeProposal, paths: list[list[int]]) -> Pass:
        assert passed.counts is not None
        moves: list[tuple[int, int, int]] = []
        kept: list[list[int]] = []
        read: list[list[int]] = []
        pads = self.padding(context.prompt)
        for row, (nodes, path, count) in enumerate(zip(tree.tokens, paths, passed.counts, strict=True)):
            if not count:
                kept.append([])
                read.append(passed.read[row])
                continue
            ids = self.memo[row]
            start = passed.fed - len(nodes)
            moves += [(row, len(ids) + node, len(ids) + place) for place, node in enumerate(path)]
            kept.append([*range(passed.fed - count, start), *(start + node for node in path)])
            self.memo[row] = ids + [nodes[node] for node in path]
            read.append(context.ids[row][: pads[row]] + self.memo[row])
        self.ragged.pick(moves)
        return Pass(passed.given, passed.output, passed.fed, read, kept, passed.counts)

    def _known(self, context: Context, stats: LevelStats, asked: Sequence[bool] | None) -> list[list[int]]:
        """The rows' own ids, after what another model has read of those that are asked was taken from it."""
        own = self.own(context)
        if isinstance(self.lender, RaggedRunner) and len(self.lender.memo) == len(own):
            taken = take_rows(self, self.lender, own, asked)
            if taken >= WORTH:
                stats.notes.append(f"takes keys and values of {taken} tokens from {self.lender.name}")
        return own

    def prefill(self, context: Context, chunk: int, stats: LevelStats, watch: Any = None) -> None:
        pads, width = self.padding(context.prompt), len(context.ids[0])
        for end in range(chunk, width, chunk):
            piece = Context([ids[: max(end, pad)] for ids, pad in zip(context.ids, pads, strict=True)], context.prompt)
            if all(len(ids) <= len(have) for ids, have in zip(self.own(piece), self.memo, strict=True)):
                continue
            self.asked = [len(ids) > pad for ids, pad in zip(piece.ids, pads, strict=True)]
            passed = self.run(piece, [[] for _ in context.ids], stats)
            if watch is not None:
                watch(passed)

    def settle(self, context: Context, stats: LevelStats) -> None:
        own = self.own(context)
        lengths = [common_prefix(held, ids) for held, ids in zip(self.memo, own, strict=True)]
        self.asked = [length < len(ids) for length, ids in zip(lengths, own, strict=True)]
        if any(self.asked):
            self.run(context, [[] for _ in own], stats)
        self.asked = None
        self.memo = own

    def plain_cache(self) -> RollbackCache:
        return self.ragged.rectangle([len(ids) for ids in self.memo])

    def keep_rows(self, rows: list[int]) -> None:
        self.ragged.keep_rows(rows)
        self.memo = [[] if row in rows[:place] else self.memo[row] for place, row in enumerate(rows)]

    def _reading(self, row: int, ids: list[int], wanted: int, parents: list[int]) -> Reading:
        known = ids[: len(ids) - len(parents)] if parents else ids
        held = min(common_prefix(self.memo[row], known), len(ids) - wanted)
        return Reading(row, ids, self.ragged.usable(row, held), wanted, parents)

    def _read(self, context: Context, readings: list[Reading], sizes: list[int], stats: LevelStats) -> Pass:
        """Feed what is to be read, and put what came out where the rows' columns are looked for.

        Args:
            sizes: logits wanted by each row of the batch.
        """
        whole, twins = once(readings)
        self.make_room(readings)
        logits: list[torch.Tensor] = []
        outputs: list[Any] = []
        for group in groups_of(whole):
            output, states = self._call_rows(context, group, stats)
            outputs.append(output)
            logits.append(states)
        for one in twins:
            assert one.like is not None
            self.ragged.copy(one.like, one.row, one.held, len(one.ids))
        return self._passed(
            context, whole, twins, sizes, (outputs, torch.cat(logits) if len(logits) > 1 else logits[0])
        )

    def _passed(
        self,
        context: Context,
        whole: list[Reading],
        twins: list[Reading],
        sizes: list[int],
        given: tuple[list[Any], torch.Tensor],
    ) -> Pass:
        """What was read, with the model's outputs and the wanted logits `[M, V]`, as levels look at it."""
        outputs, logits = given
        firsts: list[int | None] = [None] * len(sizes)  # of a row's columns in all passes
        counts = [0] * len(sizes)
        parts = [(0, 1) for _ in sizes]
        fed = offset = 0
        for one in whole:
            for row in (one.row, *(twin.row for twin in twins if twin.like == one.row)):
                firsts[row], counts[row], self.memo[row] = fed, one.count, one.ids
                parts[row] = offset + one.wanted - sizes[row], sizes[row]
            fed, offset = fed + one.count, offset + one.wanted
        read = Padded(context.ids, self.padding(context.prompt), self.memo)
        most = max(counts)
        said = RowTensors.of(logits, parts, self.device)
        return Pass(said, Spread(outputs, firsts, counts, most), most, read, counts=counts)

    def forget(self) -> None:
        """Nothing is held any more."""
        self.memo = [[] for _ in self.memo]
        self.ragged = RaggedCache(len(self.memo), self.model)

    def make_room(self, readings: Sequence[Reading]) -> None:
        """Give rows' regions room for what is to be read; what that is about to write over is no longer held."""
        for one in readings:  # at once, so that buffers grow once
            self.ragged.reserve(one.row, one.held, len(one.ids))
        self.ragged.fit()
        for one in readings:
            if one.held < len(self.memo[one.row]):
                self.memo[one.row] = self.memo[one.row][: one.held]

    def _call_rows(self, context: Context, group: list[Reading], stats: LevelStats) -> tuple[Any, torch.Tensor]:
        """One pass over the columns of some rows; the model's output, and the wanted logits `[M, V]`."""
        spans, first = [], 0
        for one in group:
            spans.append(_span(one, first))
            first += one.count
        of_kinds = [self.ragged.spans(one.row, span) for one, span in zip(group, spans, strict=True)]
        groups = {window: [kinds[window] for kinds in of_kinds] for window in self.ragged.regions}
        inputs = self._row_inputs(context, group)
        wanted = [
            place
            for one, s in zip(group, spans, strict=True)
            for place in range(s.first + s.count - one.wanted, s.first + s.count)
        ]
        if self._slices_logits:
            inputs["logits_to_keep"] = torch.tensor(wanted)  # on the CPU: the last layer may be on another device
        stats.forward_passes += 1
        try:
            with level_failures(f"the forward pass of {self.name} failed"), spanned(self.model, groups):
                output = self._forwarding.run(inputs, self.record)
        except Exception:
            self.forget()
            raise
        logits = output.logits[0]
        if logits.shape[0] != len(wanted):
            logits = logits[torch.tensor(wanted, device=logits.device)]
        return output, logits

    def _row_inputs(self, context: Context, group: list[Reading]) -> dict[str, Any]:
        ids = torch.tensor([[token for one in group for token in one.ids[one.held :]]], dtype=torch.long)
        if self._rows is not None:
            ids = torch.where(ids < self._rows, ids, 0)  # see `ModelRunner`
        positions = torch.tensor([[place for one in group for place in self._positions(context, one)]])
        if self._table is not None and self._rows is not None:
            positions.clamp_(max=self._table.rows - 1)
        assert self._cache_argument is not None
        return {
            "input_ids": ids.to(self.model_device),
            "attention_mask": None,
            "position_ids": positions.to(self.model_device),
            "use_cache": True,
            self._cache_argument: self.ragged,
        }

    def _positions(self, context: Context, one: Reading) -> Sequence[int]:
        """Position ids of the columns that are fed: the prompt's own, then counting on; nodes by their depth."""
        prompt, pad = context.prompt, self.padding(context.prompt)[one.row]
        inside = prompt.width - pad  # ids of the row's own that are its prompt
        onward = prompt.following[one.row] - inside
        places = range(one.held, len(one.ids)) if not one.parents else places_of(one)
        if one.held >= inside:
            return [onward + place for place in places]
        known = prompt.positions[one.row, pad:].tolist()
        return [known[place] if place < inside else onward + place for place in places]


def _span(one: Reading, first: int) -> Span:
    """What a row reads, as columns of a pass from `first` on; where its region is, the cache knows."""
    if not one.parents:
        return Span(first, one.count, 0, one.held)
    nodes = len(one.parents)
    sees = torch.ones(one.count, one.count, dtype=torch.bool).tril()
    sees[-nodes:, -nodes:] = ancestors(one.parents)
    return Span(first, one.count, 0, one.held, sees, torch.tensor(places_of(one)))


def take_rows(
    borrower: RaggedRunner, lender: RaggedRunner, rows: list[list[int]], asked: Sequence[bool] | None = None
) -> int:
    """As `lending.borrow`, each row by itself: columns that the lender holds and the borrower lacks are copied.

    Args:
        borrower, lender: runners; rows: ids of each row; asked: those that are copied for, None for all.

    Returns:
        Tokens taken, of the row of which the most were.
    """
    taken: list[tuple[int, int, int]] = []
    for row, ids in enumerate(rows):
        ours, theirs = borrower.memo[row], lender.memo[row]
        if not (asked is None or asked[row]) or len(theirs) - len(ours) < borrower.borrows_from:
            continue
        here, there = common_prefix(ours, ids), common_prefix(theirs, ids)
        here = borrower.ragged.usable(row, here)
        if there - here >= borrower.borrows_from and lender.ragged.usable(row, there):
            borrower.memo[row] = ids[:here]
            borrower.ragged.reserve(row, here, there)
            taken.append((row, here, there))
    if taken:
        borrower.ragged.copy_from(lender.ragged, taken)
    for row, _, end in taken:
        borrower.memo[row] = rows[row][:end]
    return max((end - first for _, first, end in taken), default=0)
