# SPDX-License-Identifier: Apache-2.0
"""An online suffix automaton that can also forget: the index a suffix drafter reads its continuations from.

A. Blumer et al., "The smallest automaton recognizing the subwords of a text" (1985). Each state stands for a
set of substrings that end at the same places of the text. The suffix link of a state leads to the state of
its longest suffix that also ends elsewhere, so the link of the newest state is the longest suffix of the text
that occurred before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from ..exactness.context import common_prefix

_EDGE, _LINK, _COUNT, _LIKELIEST = range(4)
CHANGE = 4
"""Ints for what an append changed: kind, state, id (of an edge) and the value before (-1: there was no edge).

They stand in one list: as many tuples and lists would have the interpreter look for garbage among all of its objects
every few batches, which takes a fifth of a second beside a model."""
_MARK = 3
"""Ints for an append: the state of the text before it, how many states there were, and how many changes."""

Seen = tuple[int, int, int]
"""Of a token that may come again: how often it followed, how often anything did, how many ids matched before it."""

ROOT = 0
SEPARATOR = -1
"""Put between the texts of a corpus; never drafted and never equal to a token."""

COUNTED = 32
"""States whose counts an append brings up to date, those of the longest suffixes first. Real text hardly ever
has more; in a text that loops with a short period the counts of short suffixes fall behind, which can only
change which draft looks likeliest."""

UNDOABLE = 512
"""Appends that can be taken back one by one."""


class SuffixAutomaton:
    """All substrings of a growing list of ids, with how often each occurred and what most often followed.

    Appending takes O(1) amortised steps over a text. Taking an append back costs what the append cost, so a
    text whose last tokens are taken back and replaced again and again costs more than O(1) a token in one
    case only: when it loops, each new id that breaks the loop walks one suffix link a turn of the loop.

    Args:
        undo: appends to remember for `pop`.

    Attributes:
        size: ids appended.
        lengths: per state, the length of its longest substring.
        links: per state, its suffix link (-1 for the root).
        edges: per state, id -> the state that the substring followed by this id is in.
        counts: per state, how often its substrings occurred, the newest one included.
        likeliest: per state, the id that followed most often, the latest of equals; -1 if nothing did.
        last: the state of the whole text.
    """

    def __init__(self, undo: int = UNDOABLE) -> None:
        self.size = 0
        self.lengths = [0]
        self.links = [-1]
        self.edges: list[dict[int, int]] = [{}]
        self.counts = [0]
        self.likeliest = [-1]
        self.last = ROOT
        self._most = undo
        self._marks: list[int] = []
        self._changes: list[int] = []
        self._forgotten = 0

    @property
    def undoable(self) -> int:
        """Appends that `pop` can take back."""
        return min(self._most, len(self._marks) // _MARK)

    def extend(self, tokens: Iterable[int]) -> None:
        """Append ids one by one."""
        for token in tokens:
            self.append(token)

    def append(self, token: int) -> None:
        """Append one id."""
        changes, previous = self._changes, self.last
        self._marks += (previous, len(self.lengths), self._forgotten + len(changes))
        self.size += 1
        self.last = self._add_state(self.lengths[previous] + 1, {}, 0, -1)
        state = previous
        while state >= 0 and token not in self.edges[state]:
            changes += (_EDGE, state, token, -1)
            self.edges[state][token] = self.last
            state = self.links[state]
        self.links[self.last] = ROOT if state < 0 else self._exactly(state, token)
        self._count(previous, token)
        if len(self._marks) > 2 * _MARK * self._most:
            self._forget()

    def pop(self, count: int = 1) -> None:
        """Take the last `count` appends back, as if they had never happened.

        Raises:
            IndexError: more than `undoable`.
        """
        if count > self.undoable:
            raise IndexError(f"{count} appends cannot be taken back, the last {self.undoable} can.")
        for _ in range(count):
            self.last, states, changes = self._marks[-_MARK:]
            del self._marks[-_MARK:]
            self._restore(changes - self._forgotten)
            for column in (self.lengths, self.links, self.edges, self.counts, self.likeliest):
                del column[states:]
            self.size -= 1

    def _restore(self, first: int) -> None:
        """What was there before all changes from this place of the list on."""
        undone = self._changes[first:]
        del self._changes[first:]
        for at in range(len(undone) - CHANGE, -1, -CHANGE):
            kind, state, token, old = undone[at : at + CHANGE]
            if kind == _COUNT:
                self.counts[state] = old
            elif kind == _LIKELIEST:
                self.likeliest[state] = old
            elif kind == _LINK:
                self.links[state] = old
            elif old < 0:
                del self.edges[state][token]
            else:
                self.edges[state][token] = old

    def _forget(self) -> None:
        """Appends before the last that may be taken back."""
        del self._marks[: len(self._marks) - _MARK * self._most]
        kept = self._marks[_MARK - 1] - self._forgotten if self._marks else len(self._changes)
        del self._changes[:kept]
        self._forgotten += kept

    def repeated(self) -> tuple[int, int]:
        """The longest suffix of the text that occurred before, as (state, length); (root, 0) if none did."""
        state = max(ROOT, self.links[self.last])
        return state, self.lengths[state]

    def step(self, state: int, length: int, token: int) -> tuple[int, int]:
        """Follow a text this automaton was not built from.

        Args:
            state: the state of the longest suffix of that text so far which occurs here, at first `ROOT`.
            length: the length of that suffix, at first 0.
            token: the text's next id.

        Returns:
            The same two for the text with `token`, in O(1) amortised over the text.
        """
        while state != ROOT and token not in self.edges[state]:
            state = self.links[state]
            length = self.lengths[state]
        target = self.edges[state].get(token)
        return (ROOT, 0) if target is None else (target, length + 1)

    def continuation(
        self, state: int, length: int, limit: int, floor: float, escape: Callable[[int], float]
    ) -> tuple[list[int], list[Seen]]:
        """What most often followed, token by token, each choice made with all the context walked so far.

        Where the walk reaches the end of the text it goes on from the longest repeated suffix, so that a text
        which has begun to loop is continued around the loop. The chance that a token comes again is taken to be
        `times it did / (times anything did + escape(ids matched))`, as in prediction by partial matching.

        Args:
            state, length: where to start, from `repeated` or `step`; not the root.
            limit: most ids to return.
            floor: stop before the product of the chances falls below this.
            escape: of a number of matched ids, how many continuations that were never seen count beside the seen ones.

        Returns:
            The ids, and what each was judged by.
        """
        found: list[int] = []
        seen: list[Seen] = []
        probability = 1.0
        while len(found) < limit:
            here = self.following(state, length)
            if here is None:
                break
            token, target, (again, followed, matched) = here
            probability *= again / (followed + escape(matched))
            if probability < floor:
                break
            found.append(token)
            seen.append((again, followed, matched))
            state, length = target, matched + 1
        return found, seen

    def following(self, state: int, length: int) -> tuple[int, int, Seen] | None:
        """What most often followed a place in the text; at the end of the text, its longest repeated suffix.

        Args:
            state, length: from `repeated` or `step`.

        Returns:
            The id, the state after it, and what it is judged by; None where nothing followed.
        """
        before = self.links[self.last]
        if state == self.last:
            state, length = before, self.lengths[before]
        token = self.likeliest[state] if state > ROOT else -1
        if token < 0:
            return None
        target = self.edges[state][token]
        # The newest occurrence of the repeated suffix has not been followed by anything yet.
        followed = max(1, self.counts[state] - (state == before))
        return token, target, (min(followed, self.counts[target]), followed, length)

    def _add_state(self, length: int, edges: dict[int, int], count: int, likeliest: int) -> int:
        self.lengths.append(length)
        self.links.append(ROOT)
        self.edges.append(edges)
        self.counts.append(count)
        self.likeliest.append(likeliest)
        return len(self.lengths) - 1

    def _exactly(self, state: int, token: int) -> int:
        """The state whose longest substring is that of `state` followed by `token`, split off if need be."""
        target = self.edges[state][token]
        if self.lengths[target] == self.lengths[state] + 1:
            return target
        clone = self._add_state(
            self.lengths[state] + 1, dict(self.edges[target]), self.counts[target], self.likeliest[target]
        )
        self.links[clone] = self.links[target]
        self._changes += (_LINK, target, 0, self.links[target])
        self.links[target] = clone
        while state >= 0 and self.edges[state].get(token) == target:
            self._changes += (_EDGE, state, token, target)
            self.edges[state][token] = clone
            state = self.links[state]
        return clone

    def _count(self, previous: int, token: int) -> None:
        """The suffixes of the text before `token` were followed by it once more."""
        state, counted = previous, -1
        counts, likeliest, changes = self.counts, self.likeliest, self._changes
        for _ in range(COUNTED):
            edges = self.edges[state]
            target = edges[token]
            if target != counted:
                changes += (_COUNT, target, 0, counts[target])
                counts[target] += 1
                counted = target
            best = likeliest[state]
            if token >= 0 and best != token and (best < 0 or counts[target] >= counts[edges[best]]):
                changes += (_LIKELIEST, state, 0, best)
                likeliest[state] = token
            state = self.links[state]
            if state < 0:
                return


@dataclass
class FollowedText:
    """A text that grows, and now and then goes back, with the automaton over it."""

    ids: list[int] = field(default_factory=list)
    automaton: SuffixAutomaton = field(default_factory=SuffixAutomaton)

    def follow(self, ids: list[int]) -> int:
        """Bring the automaton to `ids`; what the last ones have beyond the common prefix is taken back first.

        Returns:
            Length of the common prefix.
        """
        shared = common_prefix(self.ids, ids)
        surplus = len(self.ids) - shared
        if surplus > self.automaton.undoable:
            self.automaton = SuffixAutomaton()
            self.automaton.extend(ids)
        else:
            self.automaton.pop(surplus)
            self.automaton.extend(ids[shared:])
        self.ids = ids
        return shared
