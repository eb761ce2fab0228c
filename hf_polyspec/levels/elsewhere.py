# SPDX-License-Identifier: Apache-2.0
"""How a verifier whose passes several processes share asks the level below it.

The levels below, as far as their models are not shared themselves, run in one process, which tells the others what they
offer. So nothing that a clock, the memory of a machine, or rounding in another kind of processor decides can drive the
processes apart, and no process holds weights that it does not need. What is shared takes the same ids in all of them.

Or they run in every process ("replicated"): each drafts for itself, and they only compare what they have. Where
rounding lets them differ, what the first process has is told to the others, and counts; memos of ids (law 4) go on from
any.
"""

from __future__ import annotations

import math
import zlib
from array import array
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

from ..errors import LevelError
from ..exactness.context import Context
from ..exactness.distributions import LawMaker
from ..exactness.proposal import Proposal, TreeProposal
from ..host.ranks import Ranks
from .asking import ask, ask_for_tree
from .base import Drafter

if TYPE_CHECKING:
    from .verifier import Verifier

_LATEST = 256
"""Ids at the end of each row that a check looks at, besides its length."""
_CHAIN, _TREE, _FAILED, _NO_TREE = 1, 2, 3, 4
DIFFERED = "a draft differed between processes, by rounding: that of process 0 counted"


class Elsewhere(Drafter):
    """Stands for the levels that run in another process.

    Args:
        name: of them; reads_states: whether they borrow from the level above and read its hidden states, as heads do.
    """

    shares_noise = True

    def __init__(self, name: str = "process 0", reads_states: bool = False) -> None:
        self.name = name
        self.reads_states = reads_states
        super().__init__()

    def propose(self, context: Context, limits: list[int], law: LawMaker) -> Proposal:
        raise LevelError("the levels below the target run in process 0, and were asked in another one.")


class Asking:
    """How a level asks in this process.

    Attributes:
        ask, ask_for_tree: see `asking`; controls put their own there.
    """

    def __init__(self) -> None:
        self.ask, self.ask_for_tree = ask, ask_for_tree


class Relayed:
    """How a level asks whose passes several processes share, in place of `asking.ask` and `asking.ask_for_tree`.

    Attributes:
        here: how process 0 asks before it tells the others.
    """

    def __init__(self, relay: Relay) -> None:
        self.relay = relay
        self.here = Asking()

    def ask(
        self, source: Drafter, context: Context, rooms: list[int], law: LawMaker, vocabulary: int, eos: Collection[int]
    ) -> Proposal:
        """See `asking.ask`."""
        return self.relay.ask(self.here, source, context, rooms, law, vocabulary, eos)

    def ask_for_tree(
        self, source: Drafter, context: Context, rooms: list[int], law: LawMaker, vocabulary: int
    ) -> TreeProposal | None:
        """See `asking.ask_for_tree`."""
        return self.relay.ask_for_tree(self.here, source, context, rooms, law, vocabulary)


def asking_here(level: Verifier) -> Asking | Verifier:
    """Where a control that changes what a level is offered puts itself: other processes are told of what it leaves."""
    own = getattr(level.ask, "__self__", None)
    return own.here if isinstance(own, Relayed) else level


class Relay:
    """Has a level below asked in the process that runs it, and says what levels that draw have decided.

    Args:
        ranks: the processes.
        shared: levels whose passes they share too: these are asked in all processes.
        everywhere: whether what is not shared runs in every process, instead of the first.
        notes: where it is said, once, that processes had drafted differently.
    """

    def __init__(
        self,
        ranks: Ranks,
        shared: Collection[Drafter] = (),
        everywhere: bool = False,
        notes: list[str] | None = None,
    ) -> None:
        self.ranks = ranks
        self.everywhere = everywhere
        self.notes = [] if notes is None else notes
        self._shared = {id(level) for level in shared}
        self._kept: Proposal | None = None
        self._alone = False  # process 0 is busy with what the others do not do

    def ask(
        self,
        here: Asking,
        source: Drafter,
        context: Context,
        rooms: list[int],
        law: LawMaker,
        vocabulary: int,
        eos: Collection[int],
    ) -> Proposal:
        """See `asking.ask`; `here` is how process 0 asks."""
        if id(source) in self._shared:
            self.ranks.exchange(_state(context))
            return ask(source, context, rooms, law, vocabulary, eos)
        if self.everywhere:
            made = self._agreed(context, lambda: here.ask(source, context, rooms, law, vocabulary, eos))
            return self._as_chain(made)
        if self.ranks.leads:
            with self._told(context):
                proposal = here.ask(source, context, rooms, law, vocabulary, eos)
            self.ranks.exchange(_state(context), _chain(proposal))
            return proposal
        heard, self._kept = self._kept or self._heard(context), None
        return self._as_chain(heard)

    def ask_for_tree(
        self, here: Asking, source: Drafter, context: Context, rooms: list[int], law: LawMaker, vocabulary: int
    ) -> TreeProposal | None:
        """See `asking.ask_for_tree`; likewise."""
        if id(source) in self._shared:
            return ask_for_tree(source, context, rooms, law, vocabulary)
        if self.everywhere:
            made = self._agreed(context, lambda: here.ask_for_tree(source, context, rooms, law, vocabulary))
            return made if isinstance(made, TreeProposal) else None
        if self.ranks.leads:
            with self._told(context):
                tree = here.ask_for_tree(source, context, rooms, law, vocabulary)
            if tree is not None:
                self.ranks.exchange(_state(context), _tree(tree))
            return tree
        heard = self._heard(context)
        if isinstance(heard, TreeProposal):
            return heard
        self._kept = self._as_chain(heard)
        return None

    def _agreed(
        self, context: Context, make: Callable[[], Proposal | TreeProposal | None]
    ) -> Proposal | TreeProposal | None:
        """What each process has made by itself; what the first has, where they differ.

        Raises:
            LevelError: it failed in one of them, here in those where it did not.
        """
        made: Proposal | TreeProposal | None = None
        failure: Exception | None = None
        try:
            with self._by_itself():
                made = make()
        except Exception as error:
            failure = error
        state, said = _state(context), [] if failure is not None else _message(made)
        same, failed = self.ranks.compared(state, zlib.crc32(array("q", said).tobytes()), failure is not None)
        if failed:
            reasons = self.ranks.gathered(None if failure is None else " ".join(str(failure).split()))
            if failure is not None:
                raise failure
            rank = next(rank for rank, reason in enumerate(reasons) if reason is not None)
            raise LevelError(f"in process {rank}, {reasons[rank]}")
        if same:
            return made
        if DIFFERED not in self.notes:
            self.notes.append(DIFFERED)
        heard = self.ranks.exchange(state, said)
        return made if self.ranks.leads else _read(heard, context.batch)

    @staticmethod
    def _as_chain(found: Proposal | TreeProposal | None) -> Proposal:
        if not isinstance(found, Proposal):
            raise LevelError("process 0 offered a tree where a chain was asked for.")
        return found

    def decided(self, make: Callable[[], torch.Tensor], shape: tuple[int, ...]) -> torch.Tensor:
        """In place of `randomness.decided_here`: process 0 draws and decides, and the others are told.

        Laws that proposals were drawn from are in process 0 only, and so are the draws; nothing large has to travel.

        Raises:
            LevelError: in the others, what failed in process 0.
        """
        if self._alone:
            return make()
        if not self.ranks.leads:
            well, *found = self.ranks.first([0] * (1 + math.prod(shape)))
            if not well:
                raise LevelError(f"the target: in process 0, {self.ranks.told('')}")
            return torch.tensor(found, dtype=torch.int64).reshape(shape)
        try:
            with self._by_itself():
                made = make()
        except Exception as error:
            self.ranks.first([0] * (1 + math.prod(shape)))
            self.ranks.told(" ".join(str(error).split()))
            raise
        self.ranks.first([1, *made.flatten().tolist()])
        return made

    @contextmanager
    def _by_itself(self) -> Iterator[None]:
        before, self._alone = self._alone, True
        try:
            yield
        finally:
            self._alone = before

    @contextmanager
    def _told(self, context: Context) -> Iterator[None]:
        """What fails here is told to the others, who wait for a proposal."""
        try:
            with self._by_itself():
                yield
        except Exception as error:
            self.ranks.exchange(_state(context), [_FAILED, *str(error).encode()])
            raise

    def _heard(self, context: Context) -> Proposal | TreeProposal | None:
        return _read(self.ranks.exchange(_state(context)), context.batch)


def _state(context: Context) -> int:
    """A number that differs where rows do (of those that do, all but one in 2^32)."""
    found = 0
    for ids in context.ids:
        found = zlib.crc32(array("q", [len(ids), *ids[-_LATEST:]]).tobytes(), found)
    return found


def _message(made: Proposal | TreeProposal | None) -> list[int]:
    if made is None:
        return [_NO_TREE]
    return _tree(made) if isinstance(made, TreeProposal) else _chain(made)


def _read(message: list[int], rows: int) -> Proposal | TreeProposal | None:
    """What another process has made of so many rows; laws do not travel.

    Raises:
        LevelError: it failed.
    """
    kind, *rest = message
    if kind == _FAILED:
        raise LevelError(f"in process 0, {bytes(rest).decode()}")
    if kind == _NO_TREE:
        return None
    if kind == _CHAIN:
        tokens, origins = (_unrolled(part, rows) for part in _halves(rest, 2))
        return Proposal(tokens, None, origins)
    tokens, parents, origins = (_unrolled(part, rows) for part in _halves(rest, 3))
    return TreeProposal(tokens, parents, origins)


def _chain(proposal: Proposal) -> list[int]:
    return [_CHAIN, *_rolled(proposal.tokens), *_rolled(proposal.origins)]


def _tree(tree: TreeProposal) -> list[int]:
    return [_TREE, *_rolled(tree.tokens), *_rolled(tree.parents), *_rolled(tree.origins)]


def _rolled(rows: list[list[int]]) -> list[int]:
    """Rows as their lengths and what is in them, one after the other."""
    return [*(len(row) for row in rows), *(value for row in rows for value in row)]


def _unrolled(values: list[int], rows: int) -> list[list[int]]:
    lengths, found, start = values[:rows], [], rows
    for length in lengths:
        found.append(values[start : start + length])
        start += length
    return found


def _halves(values: list[int], parts: int) -> list[list[int]]:
    """Equal parts: tokens, parents and origins are of one form."""
    size = len(values) // parts
    return [values[part * size : (part + 1) * size] for part in range(parts)]
