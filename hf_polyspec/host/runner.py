# SPDX-License-Identifier: Apache-2.0
"""A causal LM with the memo of what its cache holds (law 4), and the one place where models are called."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from ..errors import RollbackError, level_failures
from ..exactness.context import Context, Prompt, common_prefix
from ..exactness.passes import Pass
from ..exactness.tree_geometry import ROOT
from ..telemetry.counters import LevelStats
from .cache import RollbackCache
from .columns import aligned, embedded_inputs, mask_of, positions_of
from .forwarding import Extras, Forwarding
from .lending import WORTH, borrow
from .positions import position_table
from .release import cache_argument, forward_arguments, inner_model, input_device
from .rope import crosses, reads_anew
from .row_arguments import RowArguments
from .states import empty_cache
from .trees import plant

if TYPE_CHECKING:
    from ..exactness.proposal import TreeProposal

FILLING = 0  # an id that every vocabulary has, for columns whose outputs nobody looks at


class ModelRunner:
    """Calls one model and keeps its cache true to the ids it was computed from.

    Nobody tells a runner what to forget. It compares the ids asked for with the ids its cache holds, rolls each row
    back to the common prefix, feeds the rest, and checks the cache's length afterwards.

    Args:
        model: a causal LM (or a PEFT model around one).
        name: for error messages.
        device: where logits are delivered; by default the model's own device.
        use_cache: False recomputes everything in every pass.
        record: extra forward arguments such as `output_hidden_states=True`.
        reads_embeds: whether prompt positions without ids mean anything to this model (it can read the embeddings, or
            its cache holds them); if not, it sees only the ids after them.
        replace_unknown_ids: for an assistant, whose vocabulary may have fewer rows than the target's; the target is to
            fail on an id it does not have, as it does in plain generation.
        extras: further forward arguments.
    """

    cuts = True  # the cache at any column, as trees and lending want it
    steps = False  # one column a pass
    own_rows = False  # every row has its own columns, see `RaggedRunner`

    def __init__(
        self,
        model: Any,
        name: str,
        device: torch.device | None = None,
        *,
        use_cache: bool = True,
        record: dict[str, Any] | None = None,
        reads_embeds: bool = False,
        replace_unknown_ids: bool = False,
        extras: Extras | None = None,
    ) -> None:
        self.model = model
        self.name = name
        self.model_device = input_device(model)
        self.device = device or self.model_device
        self.record = record or {}
        self.use_cache = use_cache
        self.reads_embeds = reads_embeds
        self._cache_argument = cache_argument(model)
        self._slices_logits = "logits_to_keep" in forward_arguments(model)
        self.takes_positions = "position_ids" in forward_arguments(model)
        rows = getattr(model.get_input_embeddings(), "num_embeddings", None)
        self._rows: int | None = rows if replace_unknown_ids else None
        self._table = position_table(model)
        self.cache: RollbackCache = empty_cache(model)
        self.memo: list[list[int]] = []
        self._forwarding = Forwarding(model, extras)
        self._arguments = RowArguments(inner_model(model), use_cache)
        self._present: list[int] | None = None  # rows that are left of those at the beginning, None for all
        self._prompt = 0  # columns that were read in a pass of their own and stay
        self._anew_after = reads_anew(model)
        self.stays = 0  # columns that cannot be read again as they were, once they are all read
        self.asked: list[bool] | None = None  # rows that the next pass is for, None for all
        self.lender: ModelRunner | None = None  # of a model that this one is a copy of, see `lending`
        self.borrows_from = WORTH  # fewest tokens that are taken from it
        self.note: str | None = None  # how rows run, where not each on its own; said in the statistics
        self.in_step = False  # whether a token's column in the cache must be its place in the text, see `in_step`

    @property
    def keeps_positions(self) -> bool:
        """Whether the model is called with the position ids that it is given here."""
        return self._forwarding.keeps_positions()

    def adopt(self, cache: RollbackCache, memo: list[list[int]]) -> None:
        """Start from a cache that already holds the keys and values of `memo`."""
        self.cache, self.memo = cache, memo

    def run(self, context: Context, drafts: list[list[int]], stats: LevelStats, *, columns: int = 0) -> Pass:
        """Feed what the cache lacks of context and drafts.

        Args:
            context: rows to continue, none empty.
            drafts: proposed tokens per row, possibly none.
            stats: where the forward pass is counted.
            columns: logits wanted besides the K + 1 of the draft (for a prefill that wants them all).

        Raises:
            LevelError: the model raised; the cache is left at the ids it surely holds. (That memory ran out is raised
                as it is, see `level_failures`.)
            RollbackError: the cache's length is not what was fed into it.
        """
        whole = context
        context = self._own_view(context)
        sequences = [ids + draft for ids, draft in zip(context.ids, drafts, strict=True)]
        wanted = 1 + max(len(draft) for draft in drafts)
        self._borrow(context, sequences, stats)
        self._read_prompt(context, sequences, stats)
        more = self._filling(sequences, wanted)
        filled = [draft + [FILLING] * count for draft, count in zip(drafts, more, strict=True)]
        sequences = [ids + draft for ids, draft in zip(context.ids, filled, strict=True)]
        widest = 1 + max(len(draft) for draft in filled)
        output, past, fed = self._feed(context, sequences, widest, stats, columns=columns)
        if self.use_cache:
            self._remember(sequences, past + fed)
        read = sequences if context is whole else whole.extended(filled).ids
        return Pass(self._align(output.logits, filled, widest)[:, :wanted], output, fed, read)

    def run_tree(self, context: Context, tree: TreeProposal, stats: LevelStats) -> Pass:
        """Feed what the cache lacks of the context, and a tree of nodes; then `keep_paths` must be called.

        Args:
            context: rows to continue, all positions with ids; tree: nodes after it.
            stats: where the forward pass is counted.

        Returns:
            The pass; its logits are `[B, T + 1, V]`, column 0 after the context, column j + 1 after node j.

        Raises:
            LevelError: the model raised.
        """
        wanted = 1 + max(len(nodes) for nodes in tree.tokens)
        self._borrow(context, context.ids, stats)
        self._read_prompt(context, context.extended(tree.tokens).ids, stats)
        more = self._filling(context.extended(tree.tokens).ids, wanted)
        nodes = [row + [FILLING] * count for row, count in zip(tree.tokens, more, strict=True)]
        parents = [row + [ROOT] * count for row, count in zip(tree.parents, more, strict=True)]
        sequences = context.extended(nodes).ids
        widest = 1 + max(len(row) for row in nodes)
        output, _, fed = self._feed(context, sequences, widest, stats, parents=parents)
        return Pass(self._align(output.logits, nodes, widest)[:, :wanted], output, fed, sequences)

    def keep_paths(self, passed: Pass, context: Context, tree: TreeProposal, paths: list[list[int]]) -> Pass:
        """Of the trees of the last pass only these nodes stay, per row from the context on.

        Returns:
            The pass, with what it has read.
        """
        read = context.extended([[row[n] for n in path] for row, path in zip(tree.tokens, paths, strict=True)]).ids
        width, new_width = self.cache.length, max(len(ids) for ids in read)
        columns = torch.zeros(len(read), new_width, dtype=torch.long)
        kept = []
        for b, (ids, path) in enumerate(zip(context.ids, paths, strict=True)):
            nodes = len(passed.read[b]) - len(ids)  # with what the row was filled up with
            first = width - nodes  # column of the row's first node
            left = new_width - len(read[b])
            columns[b, left : left + len(ids)] = torch.arange(first - len(ids), first)
            columns[b, left + len(ids) :] = first + torch.tensor(path, dtype=torch.long)
            start = passed.fed - nodes
            kept.append([*range(max(0, start - len(ids)), start), *(start + node for node in path)])
        self.cache.pick(columns)
        self._remember(read, new_width)
        return replace(passed, read=read, kept=kept)

    def reads_alone(self, context: Context) -> bool:
        """Whether the prompt has yet to be read, in a pass with nothing behind it."""
        return self._forwarding.marks_prompt and self.use_cache and not self._prompt

    def _read_prompt(self, context: Context, sequences: list[list[int]], stats: LevelStats) -> None:
        if not self.reads_alone(context):
            return
        self._prompt = context.prompt.width  # what an image stands for, say, cannot be read again as ids
        if min((len(ids) for ids in self.memo), default=0) >= self._prompt:
            self._forwarding.begun = True  # taken from another model
        elif min(map(len, sequences)) > self._prompt:
            ids = [row[: self._prompt] for row in context.ids]
            self.run(Context(ids, context.prompt), [[] for _ in ids], stats)

    def _borrow(self, context: Context, sequences: list[list[int]], stats: LevelStats) -> None:
        if self.lender is not None and not context.prompt.hidden:
            taken = borrow(self, self.lender, sequences)
            if taken >= WORTH:
                stats.notes.append(f"takes keys and values of {taken} tokens from {self.lender.name}")

    def _feed(
        self,
        context: Context,
        sequences: list[list[int]],
        wanted: int,
        stats: LevelStats,
        *,
        columns: int = 0,
        parents: list[list[int]] | None = None,
    ) -> tuple[Any, int, int]:
        """One pass over what the cache lacks of these rows, with the parents of the nodes that end them if any do: the
        model's output, the columns that were cached before, and those that were fed."""
        keep, fed = self._plan(sequences, wanted)
        past = self._roll_back(keep)
        inputs = self._inputs(context, sequences, keep, past, fed)
        if not self._forwarding.plain:
            inputs = self._forwarding.complete(inputs, sequences, past, self._present)
        if parents is not None:
            plant(inputs, context, sequences, parents, past + fed, self.model)
            # Until it is known which path stays, no id of the cache is certain.
            self.memo = [[] for _ in sequences]
        grown = [len(ids) - context.prompt.width for ids in sequences]
        output = self._call(inputs, max(wanted, columns), past, stats, grown)
        if self._forwarding.extras.first and self.cuts:
            self.cache.set_apart(past + fed)
        return output, past, fed

    def _call(self, inputs: dict[str, Any], logits: int, past: int, stats: LevelStats, grown: list[int]) -> Any:
        if self._slices_logits:
            inputs["logits_to_keep"] = logits
        stats.forward_passes += 1
        try:
            with level_failures(f"the forward pass of {self.name} failed"), self._arguments.of(self._present, grown):
                return self._forwarding.run(inputs, self.record)
        except Exception:
            self._recover(past)
            raise

    def can_read(self, context: Context) -> bool:
        """Whether every row has something that this model can be fed."""
        view = self._own_view(context)
        return all(len(ids) > 0 for ids in view.ids) and any(self.within(context, [1] * context.batch))

    def within(self, context: Context, limits: list[int]) -> list[int]:
        """Limits of what this model is to say, cut where its positions end; 0 for rows it cannot be fed whole.

        A token that was said last need not be fed: there may be one more than the model has positions left.
        """
        return limits if self._table is None else self._table.within(self._own_view(context), limits)

    def _own_view(self, context: Context) -> Context:
        """The context as this model sees it: without embedded positions if they mean nothing to it."""
        if self.reads_embeds or (context.prompt.embeds is None and not context.prompt.hidden):
            return context
        if not context.prompt.hidden:
            return Context(context.ids, replace(context.prompt, embeds=None))
        ids = [context.visible(b) for b in range(context.batch)]
        return Context(ids, Prompt(0, None, torch.full((len(ids), 1), -1, dtype=torch.long)))

    def prefill(
        self, context: Context, chunk: int, stats: LevelStats, watch: Callable[[Pass], None] | None = None
    ) -> None:
        """Feed all but the last token of an even-length context in pieces of `chunk`; `watch` sees all passes."""
        length = 0 if self.reads_alone(context) else len(context.ids[0])
        start = len(self.memo[0]) if self.memo else 0
        for end in range(start + chunk, length, chunk):
            piece = Context([ids[:end] for ids in context.ids], context.prompt)
            if not self.can_read(piece):
                continue
            passed = self.run(piece, [[] for _ in context.ids], stats)
            if watch is not None:
                watch(passed)

    @contextmanager
    def recording(self, record: dict[str, Any]) -> Iterator[None]:
        """Give these arguments to every forward pass for a while, besides the usual ones."""
        usual, self.record = self.record, {**record, **self.record}
        try:
            yield
        finally:
            self.record = usual

    def settle(self, context: Context, stats: LevelStats) -> None:
        """Make the cache hold exactly these rows, all of one length; a forward pass only if something is missing."""
        lengths = [common_prefix(held, ids) for held, ids in zip(self.memo, context.ids, strict=True)]
        if lengths != [len(ids) for ids in context.ids]:
            self.run(context, [[] for _ in context.ids], stats)
        else:
            self.cache.realign([len(ids) for ids in self.memo], lengths)
            self.memo = context.ids

    def lacks(self, context: Context) -> list[int]:
        """Per row, how many ids it has that were not read, as far as numbers tell."""
        held = self.memo or [[] for _ in context.ids]
        return [len(ids) - len(have) for ids, have in zip(context.ids, held, strict=True)]

    def plain_cache(self) -> RollbackCache:
        """The cache with all rows ending at its right edge; for after `settle`."""
        return self.cache

    def keep_rows(self, rows: list[int]) -> None:
        """Only these rows go on."""
        self.cache.keep_rows(rows)
        self._present = rows if self._present is None else [self._present[row] for row in rows]
        self.memo = [self.memo[row] for row in rows] if self.memo else []

    def add_rows(self, count: int) -> None:
        """So many rows join behind the others; nothing of them has been read."""
        self.cache.add_rows(count)
        self.memo = [*self.memo, *([] for _ in range(count))] if self.memo else []

    def _plan(self, sequences: list[list[int]], wanted: int) -> tuple[list[int], int]:
        """How many cached columns each row keeps, and how many columns F all rows feed.

        Rows that need fewer columns than the neediest are rolled back a little further, so that the input is
        rectangular and every row's cache still ends at the right edge.
        """
        if self._anew_after is not None and crosses(self._anew_after, self.memo, sequences):
            self.memo = []
            self.cache.shrink(0)
        if not self.use_cache or not self.memo:
            return [0] * len(sequences), max(len(ids) for ids in sequences)
        missing = [
            max(len(ids) - common_prefix(held, ids), min(wanted, len(ids)))
            for held, ids in zip(self.memo, sequences, strict=True)
        ]
        fed = max(missing)
        return [max(0, len(ids) - fed) for ids in sequences], fed

    def _filling(self, sequences: list[list[int]], wanted: int) -> list[int]:
        """How many columns each row is fed behind its own, so that none is rolled back behind the cache's floor.

        Rows that run in step are filled up to the longest: a token's column in the cache is its place in the text. None
        sees what stands behind its own. Otherwise the neediest decides how many all feed; with these none needs more.
        """
        if self.in_step:
            longest = max(len(ids) for ids in sequences)
            return [longest - len(ids) for ids in sequences]
        floor = self.cache.floor if self.use_cache and self.memo else 0
        if not floor:
            return [0] * len(sequences)
        fed = self._plan(sequences, wanted)[1]
        return [max(0, floor + fed - len(ids)) for ids in sequences]

    def _roll_back(self, keep: list[int]) -> int:
        return self.cache.realign([len(ids) for ids in self.memo], keep) if self.memo and self.use_cache else 0

    def _inputs(
        self, context: Context, sequences: list[list[int]], keep: list[int], past: int, fed: int
    ) -> dict[str, Any]:
        width = past + fed
        # Every row's sequence ends at column `width`, so row b has this many unused columns at its left.
        unused = [width - len(ids) for ids in sequences]
        rows = [[0] * (fed - len(ids)) + ids[-fed:] for ids in sequences]
        ids = torch.tensor(rows, dtype=torch.long)  # [B, F]
        if self._rows is not None:
            # A smaller vocabulary than the target's lacks some ids: any other in their place leaves the chain exact,
            # since what this level then proposes carries the law it was drawn from.
            ids = torch.where(ids < self._rows, ids, 0)
        mask = mask_of(context, unused, width)
        inputs: dict[str, Any] = {
            "attention_mask": None if mask is None else mask.to(self.model_device),
            "use_cache": self.use_cache,
            **({} if self._cache_argument is None else {self._cache_argument: self.cache if self.use_cache else None}),
        }
        if self.takes_positions:
            positions = positions_of(context, sequences, fed)
            if self._table is not None and self._rows is not None:
                # Rows past an assistant's last position are fed beside others, and asked for nothing.
                positions.clamp_(max=self._table.rows - 1)
            inputs["position_ids"] = positions.to(self.model_device)
        if context.prompt.embeds is not None and min(keep) < context.prompt.embeds.shape[1]:
            inputs["inputs_embeds"] = embedded_inputs(
                self.model, context.prompt, ids.to(self.model_device), unused, width
            )
        else:
            inputs["input_ids"] = ids.to(self.model_device)
        return inputs

    def _align(self, logits: torch.Tensor, drafts: list[list[int]], wanted: int) -> torch.Tensor:
        return aligned(logits, drafts, wanted, self.device)

    def _remember(self, sequences: list[list[int]], expected: int) -> None:
        self.memo = sequences
        if self.cuts:
            read = self.stays if self._anew_after is None and min(map(len, sequences)) >= self.stays else 0
            self.cache.floor = max(self.cache.floor, self._prompt, read)
        if (held := self.cache.length) != expected:
            raise RollbackError(
                f"{self.name}'s cache holds {held} tokens after a pass that should have left {expected}; "
                f"{type(self.model).__name__} does not keep its cache in a way that can be rolled back."
            )

    def _recover(self, past: int) -> None:
        """After a failed pass: whatever some layers already stored of it is dropped."""
        for layer in self.cache.rollable:
            layer.shrink(past)
        self.memo, self.cache = [], empty_cache(self.model)
