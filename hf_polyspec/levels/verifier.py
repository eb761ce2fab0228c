# SPDX-License-Identifier: Apache-2.0
"""The heart: a model and the level below it, which together are a level again.

The target is a `Verifier` over a `Verifier` over a `Drafter`; a chain of any length is this one class.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from ..exactness.context import Context
from ..exactness.distributions import LawMaker
from ..exactness.judgement import Going, judge, record
from ..exactness.passes import Pass
from ..exactness.proposal import Proposal, TreeProposal
from ..exactness.row_tensors import fit_vocabulary
from ..exactness.tree_geometry import depths
from ..exactness.tree_judgement import judge_tree, record_tree
from ..host.lending import WORTH
from ..host.moments import one_moment
from ..host.runner import ModelRunner
from ..telemetry.counters import Check, Counted
from .asking import ask, ask_for_tree
from .base import Drafter
from .block import Block
from .emission import Emission, origins_of
from .ending import Ending
from .picking import picked


class Verifier(Drafter):
    """A model that checks the level below, and hands up what it emits, with its own law where that is tested (law 1).

    Args:
        runner: the model.
        below: the level whose proposals are checked.
        name: shown in telemetry and errors.
        block_size: tokens a middle collects before it hands them up; a block may run over by the last round.
        rule: "auto", "token" or "block" verification, where levels draw by themselves.
        eos: ids that end a text: nothing is drafted after one.
        pad: id that finished rows are continued with.
        draft_limit: most tokens asked of the level below in one round, None for as many as it likes to give.
        trees: whether the model can check trees.
        note: said once in the statistics of a generation.
        bias_budget: 0 to 1, the share of rejections that is waived (`verification.verify_tokens`); 0 is exact.
        direct_tokens: a draft of at least so many tokens that nobody drew goes up unchecked; 0 has every draft checked.

    Attributes:
        source: the level that is asked for proposals: `below`, one further down, or `NoDraft`. A control may change
            it, as it may change `block_size` and `draft_limit`, between two rounds.
        observer: told of every check, or None.
        going: says which rows go on behind a token, where processors keep state; None: all but those that it ends.
        borrowers: models below that take this one's keys and values instead of reading a prompt (see `lending`).
        ask, ask_for_tree: how `source` is asked (see `asking`); in several processes, see `elsewhere`.
        scored: whether somebody reads what emissions tell besides tokens; said by a target's loop.
        ending: decides when the block of a row that is alone goes up; None where `block_size` and `direct_tokens` do.
        watchers: levels that are shown this model's reading of a prompt, since the model above them does not read it.
    """

    def __init__(
        self,
        runner: ModelRunner,
        below: Drafter,
        *,
        name: str,
        block_size: int = 8,
        rule: str = "auto",
        eos: frozenset[int] = frozenset(),
        pad: int = 0,
        draft_limit: int | None = None,
        trees: bool = False,
        note: str | None = None,
        bias_budget: float = 0.0,
        direct_tokens: int = 0,
    ) -> None:
        self.name = name
        super().__init__()
        self.runner = runner
        self.below = below
        self.block_size = block_size
        self.rule = rule
        self.eos = eos
        self.pad = pad
        self.draft_limit = draft_limit
        self.trees = trees
        self.note = note
        self.bias_budget = bias_budget
        self.direct_tokens = direct_tokens
        self.source: Drafter = below
        self.observer: Callable[[Check], None] | None = None
        self.going: Going | None = None
        self.scored = False
        self.ending: Ending | None = None
        self.borrowers: list[ModelRunner] = []
        self.watchers: list[Drafter] = []
        self.vocabulary = 0
        self.ask, self.ask_for_tree = ask, ask_for_tree
        self._block = Block.of(0)

    shares_noise = True

    @property
    def most_tokens(self) -> int:
        return self.block_size

    def begin(self, index: int, batch: int, vocabulary: int) -> None:
        super().begin(index, batch, vocabulary)
        self.vocabulary = vocabulary
        self.stats.notes += [note for note in (self.note, self.runner.note) if note]
        self.below.begin(index + 1, batch, vocabulary)

    def round(self, context: Context, limits: list[int], law: LawMaker) -> Emission:
        """One draft and one check: every row with a positive limit emits 1 to `limits[b]` tokens.

        Args:
            context: the rows; limits: most tokens a row may emit, 0 for rows that emit nothing.
            law: this verifier's law maker.

        Raises:
            LevelError: a model's forward pass failed.
        """
        active = [limit > 0 for limit in limits]
        if self.reads_for_others(context, active):
            return self._round_without_draft(context, active, law)
        rooms = self._rooms_below(context, limits)
        if self.trees and law.takes_trees and not context.prompt.hidden:
            began = self.stats.clock()
            tree = self.ask_for_tree(self.source, context, rooms, law, self.vocabulary)
            if tree is not None:
                return self._round_of_tree(context, tree, active, law, rooms, began)
        began = self.stats.clock()
        proposal = self.ask(self.source, context, rooms, law, self.vocabulary, self.eos)
        return self._check(context, proposal, active, law, rooms, began)

    def _watched(self, law: LawMaker) -> AbstractContextManager[None]:
        """Notices what dropout draws in a pass of a model that is being trained."""
        quiet = law.noise is None or not self.runner.model.training
        return nullcontext() if quiet or law.noise is None else law.noise.watched()

    def _check(
        self, context: Context, proposal: Proposal, active: list[bool], law: LawMaker, rooms: list[int], began: float
    ) -> Emission:
        """The pass over a proposal and what it makes of it; the draft was begun at `began`."""
        offered = self.stats.clock()
        emission = self._judged(context, proposal, active, law)
        self.below.watch(emission.passed)
        self.source.observe(*_as_counted(emission.counted))
        self._tell(rooms, emission.drafted, emission.counted, [], emission.passed, began, offered)
        return emission

    def _judged(self, context: Context, proposal: Proposal, active: list[bool], law: LawMaker) -> Emission:
        with self.stats.timed():
            self.runner.asked = active
            found = picked(self, context, proposal, active, law)
            if found is not None:
                return found
            with self._watched(law):
                passed = self.runner.run(context, proposal.tokens, self.stats)
            logits = fit_vocabulary(passed.given, self.vocabulary)
            rules, leads = (self.rule, self.pad, self.bias_budget, self.going), self._ending(len(active)) is not None
            judgement = judge(law, context, proposal, logits, active, *rules, leads=leads)
            counted = record(self.stats, proposal, judgement, active, self.eos)
            self.stats.bias += sum(judgement.bias)
        return Emission(
            judgement.tokens,
            judgement.p,
            origins_of(self.index, proposal, judgement),
            [len(row) for row in proposal.tokens],
            judgement.accepted,
            logits,
            judgement.scores,
            passed,
            judgement.bias,
            counted,
            judgement.leads,
        )

    def reads_for_others(self, context: Context, active: list[bool] | None = None) -> bool:
        """Whether this level has a prompt to read that levels below would otherwise read for themselves.

        Args:
            context: the rows; active: those that something is asked of, None for all.
        """
        if self.runner.reads_alone(context):
            return True
        if not self.borrowers or context.prompt.hidden:
            return False
        # Row by row: those of a batch may come to be of very different lengths.
        lacking = self.runner.lacks(context)
        return min([count for count, one in zip(lacking, active or [], strict=False) if one] or lacking) > WORTH

    def _round_without_draft(self, context: Context, active: list[bool], law: LawMaker) -> Emission:
        """One token a row from the pass that reads the prompt, which levels below are shown as their own."""
        nothing = Proposal.empty(len(active))
        with self.runner.recording(self._borrowers_record()):
            emission = self._judged(context, nothing, active, law)
        for level in (self.below, *self.watchers):
            level.watch(emission.passed)
        return emission

    def _tell(
        self,
        rooms: list[int],
        drafted: list[int],
        counted: list[Counted],
        nodes: list[int],
        passed: Pass,
        began: float,
        offered: float,
    ) -> None:
        """Tell the observer of a check whose draft was begun and offered at these times."""
        if self.observer is None:
            return
        source = None if isinstance(self.source, NoDraft) else self.source.index
        now = self.stats.clock()
        # A text that ended inside says nothing of what the level below would have offered behind its end.
        ended = [row.drafted < count for row, count in zip(counted, drafted, strict=True)]
        asked = [min(room, row.drafted) if end else room for room, row, end in zip(rooms, counted, ended, strict=True)]
        judged, accepted = _as_counted(counted)
        longest, seconds = max(drafted, default=0), (now - offered, offered - began)
        fed = passed.columns
        self.observer(Check(self.index, source, asked, judged, accepted, longest, nodes, fed, *seconds, passed.total))

    def _round_of_tree(
        self, context: Context, tree: TreeProposal, active: list[bool], law: LawMaker, rooms: list[int], began: float
    ) -> Emission:
        """The check of a tree; its depth counts as the number of tokens drafted."""
        offered = self.stats.clock()
        drafted = [max(depths(parents), default=0) for parents in tree.parents]
        with self.stats.timed():
            self.runner.asked = active
            with self._watched(law):
                passed = self.runner.run_tree(context, tree, self.stats)
            logits = fit_vocabulary(passed.logits, self.vocabulary)
            judgement = judge_tree(law, context, tree, logits, active)
            passed = self.runner.keep_paths(passed, context, tree, judgement.paths)
            accepted = [len(path) for path in judgement.paths]
            counted = record_tree(self.stats, tree, judgement, active, self.eos)
        self.below.watch(passed)
        inside = [path[: row.accepted] for path, row in zip(judgement.paths, counted, strict=True)]
        self.source.observe_tree(tree, inside)
        self._tell(rooms, drafted, counted, [len(row) for row in tree.tokens], passed, began, offered)
        origins = [
            [*(of_row[node] for node in path), self.index] if alive else []
            for of_row, path, alive in zip(tree.origins, judgement.paths, active, strict=True)
        ]
        return Emission(
            judgement.tokens,
            judgement.p,
            origins,
            drafted,
            accepted,
            judgement.logits,
            judgement.scores,
            passed,
            counted=counted,
        )

    def propose(self, context: Context, limits: list[int], law: LawMaker) -> Proposal:
        """Collect a block: rounds until every row has `block_size` tokens, an end-of-text token, or its limit.

        Whether a row goes on is decided from what it already holds, never from a token that is then left out (law 2).
        """
        self._block = block = Block.of(context.batch)
        if not any(limits) or not self.runner.can_read(context):
            return block.proposal()
        held = context
        ending = self._ending(context.batch)
        closes = self.direct_tokens > 0 or ending is not None
        with one_moment() if self._is_alone(law) else nullcontext():
            while any(room := self.runner.within(held, self._rooms(block, limits))):
                emission = self._round_or_close(held, room, law, block) if closes else self.round(held, room, law)
                if emission is None:
                    break
                for b, emitted in enumerate(emission.tokens):
                    taken = self._until_end(emitted)
                    p = None if emission.p is None else emission.p[b, :taken]
                    block.add(b, emitted[:taken], emission.origins[b][:taken], p)
                    if ending is not None:
                        ending.add(taken, emission.leads[b][:taken] if emission.leads else [])
                held = context.extended(block.tokens)
        return block.proposal()

    def _ending(self, rows: int) -> Ending | None:
        return self.ending if rows == 1 else None

    def _is_alone(self, law: LawMaker) -> bool:
        """Whether no code of the caller's runs between this level's passes over a block."""
        return law.asks_nobody and self.below.drafts_alone and self.source.drafts_alone

    def _round_or_close(self, context: Context, limits: list[int], law: LawMaker, block: Block) -> Emission | None:
        """A round of the rows whose draft is to be checked here; the others' blocks end with what they were offered.

        Which way a draft goes is decided by its length, or by an `Ending`: nobody drew it (law 2).
        """
        rooms = self._rooms_below(context, limits)
        began = self.stats.clock()
        offered = self.ask(self.source, context, rooms, law, self.vocabulary, self.eos)
        going, ending = [limit > 0 for limit in limits], self._ending(context.batch)
        if ending is not None:
            ends, offered = ending.choose(self.source, len(block.tokens[0]), offered)
            going = [not ends]
        elif offered.q is None:
            long = [len(draft) >= self.direct_tokens for draft in offered.tokens]
            going = [on and not (long[b] and self.source.is_sure(b)) for b, on in enumerate(going)]
        tokens, origins = list(offered.tokens), list(offered.origins)
        for b, on in enumerate(going):
            if limits[b] > 0 and not on:
                block.close(b, tokens[b], origins[b])
                tokens[b], origins[b], rooms[b] = [], [], 0
        if not any(going):
            return None  # nothing was fed: there is no pass to tell of
        return self._check(context, Proposal(tokens, offered.q, origins), going, law, rooms, began)

    @property
    def checked(self) -> list[int]:
        """Per row, the tokens of its last block that this level emitted itself: those behind them went up unchecked."""
        return [len(row) - last for row, last in zip(self._block.tokens, self._block.unchecked, strict=True)]

    def observe(self, drafted: list[int], accepted: list[int]) -> None:
        """What became of drafts that went up unchecked is told to the level that made them."""
        passed_on, checked = self._block.unchecked, self.checked
        if not any(passed_on):
            return
        reached = [max(0, count - first) for count, first in zip(drafted, checked, strict=True)]
        judged = [last if kept >= first else 0 for last, kept, first in zip(reached, accepted, checked, strict=True)]
        self.source.observe(judged, [max(0, kept - first) for kept, first in zip(accepted, checked, strict=True)])

    def prefill(self, context: Context, chunk: int) -> None:
        """Read a long prompt in pieces of `chunk` columns, on every level with a model that has to read it."""
        if self.runner.can_read(context) and self.runner.lender is None:
            self._read(context, chunk)
        self.below.prefill(context, chunk)

    def _read(self, context: Context, chunk: int) -> None:
        """All but the last token, with what a borrower's own passes would show to the level below it."""

        def watch(passed: Pass) -> None:
            for level in (self.below, *self.watchers):
                level.watch(passed)

        with self.stats.timed(), self.runner.recording(self._borrowers_record()):
            self.runner.prefill(context, chunk, self.stats, watch)

    def _borrowers_record(self) -> dict[str, Any]:
        """Forward arguments that make a pass show what levels below read of the models that borrow from this one."""
        return {name: value for borrower in self.borrowers for name, value in borrower.record.items()}

    def keep_rows(self, rows: list[int]) -> None:
        self.runner.keep_rows(rows)
        self.below.keep_rows(rows)

    def add_rows(self, count: int) -> None:
        self.runner.add_rows(count)
        self.below.add_rows(count)

    @property
    def takes_rows(self) -> bool:
        return self.below.takes_rows

    def end(self) -> None:
        self.below.end()

    def _rooms(self, block: Block, limits: list[int]) -> list[int]:
        """Per row, how many tokens its block may still take; 0 once it is complete."""
        return block.rooms(limits, None if self._ending(len(limits)) else self.block_size, self.eos)

    def _rooms_below(self, context: Context, limits: list[int]) -> list[int]:
        """Per row, tokens the level below may propose, so that this model can still be fed all of them."""
        return [self._room_below(limit) for limit in self.runner.within(context, limits)]

    def _room_below(self, limit: int) -> int:
        """Tokens the level below may propose: this verifier's own token takes one place of the limit."""
        room = max(0, limit - 1)
        return room if self.draft_limit is None else min(room, self.draft_limit)

    def _until_end(self, tokens: list[int]) -> int:
        """How many of the tokens count: up to and including the first that ends the text."""
        for i, token in enumerate(tokens):
            if token in self.eos:
                return i + 1
        return len(tokens)


def _as_counted(counted: list[Counted]) -> tuple[list[int], list[int]]:
    """Per row, tokens drafted and accepted as far as the text goes."""
    return [row.drafted for row in counted], [row.accepted for row in counted]


class NoDraft(Drafter):
    """Proposes nothing: a verifier above it decodes one token a pass."""

    name = "no draft"
    shares_noise = True
    asks_nobody = True

    def propose(self, context: Context, limits: list[int], law: LawMaker) -> Proposal:
        return Proposal.empty(len(limits))
