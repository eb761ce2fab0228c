# SPDX-License-Identifier: Apache-2.0
"""A drafter without a model: what followed the last few tokens the last times they occurred."""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ..errors import LevelError
from ..exactness.context import Context, Prompt
from ..exactness.distributions import LawMaker
from ..exactness.proposal import Proposal
from .base import Drafter
from .suffix_automaton import ROOT, SEPARATOR, FollowedText, Seen, SuffixAutomaton

MAX_TOKENS = 24
MIN_PROBABILITY = 0.2
"""Chance of a whole draft that is worth checking on a CPU, where every row of a pass costs something."""
EAGER_PROBABILITY = 0.03
"""The same where rows of a pass cost next to nothing."""

# The chance that a token comes again, after one occurrence and a match of 1, 2, 3 and 8 ids, is 0.29, 0.49, 0.61 and
# 0.83 by these. On greedy texts of a 135M model 0.29, 0.57, 0.64 and 0.95 came again; a little more doubt of long
# matches was quickest there, and values near these are as good within 2 %.
ESCAPE, POWER = 2.4, 1.2
PRIOR = 8.0
"""Rejections that a row is taken to have had, as expected, before its first."""
MOST_DOUBT = 4.0
"""A match of three ids still gets a draft then, so a row whose text begins to repeat is never given up."""


def escape(length: int) -> float:
    """Continuations never seen that count beside those seen after a match of `length` ids."""
    return float(ESCAPE * length**-POWER)


@dataclass
class _Corpus:
    """Texts that a drafter and its copies search, in as many threads as there are.

    Attributes:
        automaton: over the texts; None before the first.
        learnt: how often texts were added: states that rows remember may have been split since.
        lock: held by whoever reads or adds.
    """

    automaton: SuffixAutomaton | None = None
    learnt: int = 0
    lock: threading.RLock = field(default_factory=threading.RLock, repr=False, compare=False)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, lock=threading.RLock())

    def add(self, texts: list[list[int]]) -> None:
        with self.lock:
            self.automaton = self.automaton or SuffixAutomaton(undo=0)
            for text in texts:
                self.automaton.extend(text)
                self.automaton.append(SEPARATOR)
            self.learnt += 1


@dataclass(frozen=True)
class _Mask:
    """Which ids of a row's prompt are real: those from `first` on, or those that `inside` says, if it is not None."""

    first: int
    inside: list[int] | None = None

    @classmethod
    def of(cls, mask: list[int]) -> _Mask:
        first = mask.index(1) if 1 in mask else len(mask)
        return cls(first, None if all(mask[first:]) else mask)


@dataclass
class _Row(FollowedText):
    """One row: its text, the automaton over it, and where it stands in the corpus after each id."""

    matches: list[tuple[int, int]] = field(default_factory=list)
    learnt: int = 0
    draft: list[Seen] = field(default_factory=list)
    rejected: float = PRIOR
    expected: float = PRIOR

    @property
    def doubt(self) -> float:
        """Rejections had over rejections expected: above 1 the text repeats itself less than its matches say."""
        return min(MOST_DOUBT, max(1 / MOST_DOUBT, self.rejected / self.expected))

    def learn(self, proposed: int, kept: int) -> None:
        """Of the last draft `proposed` tokens were checked and the first `kept` accepted."""
        for again, followed, length in self.draft[: min(proposed, kept + 1)]:
            self.expected += 1 - again / (followed + escape(length))
        self.rejected += kept < min(proposed, len(self.draft))

    def chances(self, count: int) -> list[float]:
        """The chance that the last draft is accepted up to each of its first `count` tokens."""
        found, reached, doubt = [], 1.0, self.doubt
        for again, followed, length in self.draft[:count]:
            reached *= again / (followed + doubt * escape(length))
            found.append(reached)
        return found

    def search(self, ids: list[int], corpus: _Corpus) -> None:
        """Bring everything to `ids`; the corpus is locked."""
        shared = self.follow(ids)
        if corpus.automaton is None:
            return
        if corpus.learnt != self.learnt:
            self.matches, self.learnt = [], corpus.learnt
        del self.matches[shared:]
        state, length = self.matches[-1] if self.matches else (ROOT, 0)
        for token in ids[len(self.matches) :]:
            state, length = corpus.automaton.step(state, length, token)
            self.matches.append((state, length))


class SuffixDrafter(Drafter):
    """Drafts what most often followed the longest suffix that occurred before, in the row or in a corpus.

    Costs no forward pass, and pays where texts repeat: editing, code, summaries, retrieval, agents. The index
    is an online suffix automaton per row (SAM-Decoding, arXiv 2411.10666). A draft goes on while it is likely enough
    to be accepted as a whole, judged by how often each token followed, how many ids matched before it, and how the
    row's drafts have fared (a product of frequencies as in SuffixDecoding, arXiv 2411.04975, with an escape as in
    prediction by partial matching). Nothing is drawn, so proposals are one-hot (`q` is None).

    One object may be used by several threads: a second generation at the same time gets a copy of it, which searches
    the same corpus and keeps its own text and counters.

    Args:
        corpus: texts as lists of token ids, searched as well as the row's own; indexed once, kept across
            generations, shared by all rows. A match in it counts only if longer than the one in the row.
        min_match: ids that must match before anything is drafted, 1 or more.
        max_tokens: most tokens of a draft, 1 or more.
        min_probability: 0 to 1; a draft ends before its chance to be accepted as a whole is lower. By default
            `MIN_PROBABILITY` where the laws of the chain are on a CPU, `EAGER_PROBABILITY` elsewhere.
        eos: ids that end a text: nothing is drafted after one.

    Raises:
        TypeError: the corpus is not a list of lists of ints.
        ValueError: an argument or an id is out of range.
    """

    name = "suffix"
    shares_noise = True
    tells_chances = True
    asks_nobody = True

    def __init__(
        self,
        corpus: Iterable[Sequence[int]] = (),
        *,
        min_match: int = 1,
        max_tokens: int = MAX_TOKENS,
        min_probability: float | None = None,
        eos: Iterable[int] = (),
    ) -> None:
        super().__init__()
        _require_count("min_match", min_match)
        _require_count("max_tokens", max_tokens)
        if min_probability is not None and not 0 <= min_probability <= 1:
            raise ValueError(f"min_probability must be a number from 0 to 1, got {min_probability!r}.")
        self.min_match = min_match
        self.max_tokens = max_tokens
        self.min_probability = min_probability
        self.eos = frozenset(eos)
        self.vocabulary: int | None = None
        self._corpus = _Corpus()
        self._rows: list[_Row] = []
        self._prompt: Prompt | None = None
        self._masks: list[_Mask] = []
        self.learn(corpus)

    @property
    def corpus(self) -> SuffixAutomaton | None:
        """The index over the corpus, None without one; read-only."""
        return self._corpus.automaton

    def for_another(self) -> SuffixDrafter:
        other = copy.copy(self)
        other._rows, other._prompt = [], None
        return other

    def learn(self, texts: Iterable[Sequence[int]]) -> None:
        """Add texts to the corpus, for instance answers given earlier; at any time, from any thread.

        Args:
            texts: lists of token ids.

        Raises:
            TypeError, ValueError: as for `corpus`; nothing has been added then.
        """
        checked = _as_texts(texts)
        if checked:
            self._corpus.add(checked)

    @property
    def most_tokens(self) -> int:
        return self.max_tokens

    def begin(self, index: int, batch: int, vocabulary: int) -> None:
        super().begin(index, batch, vocabulary)
        self.vocabulary = vocabulary
        self._rows = [_Row() for _ in range(batch)]
        self._prompt = None

    def long_is_sure(self, device: torch.device) -> bool:
        return self.min_probability is not None or self._floor(device) >= MIN_PROBABILITY

    def propose(self, context: Context, limits: list[int], law: LawMaker) -> Proposal:
        with self.stats.timed():
            if len(self._rows) != context.batch:
                self._rows = [_Row() for _ in range(context.batch)]
            self._read_masks(context.prompt)
            floor = self._floor(law.device)
            with self._corpus.lock:
                tokens = [
                    self._continue(row, self._text(context, b), limits[b], floor) if limits[b] > 0 else []
                    for b, row in enumerate(self._rows)
                ]
        self.stats.drafted += sum(len(row) for row in tokens)
        rows = self._rows

        def chances() -> list[list[float]]:
            return [row.chances(len(own)) for row, own in zip(rows, tokens, strict=True)]

        return Proposal(tokens, None, [[self.index] * len(row) for row in tokens], chances)

    def observe(self, drafted: list[int], accepted: list[int]) -> None:
        self._check_rows(len(drafted) == len(self._rows))
        for row, proposed, kept in zip(self._rows, drafted, accepted, strict=True):
            if not proposed:
                continue
            self.stats.accepted += kept
            row.learn(proposed, kept)

    def keep_rows(self, rows: list[int]) -> None:
        self._check_rows(max(rows) < len(self._rows))
        # A row that is wanted twice starts over in its second place: two rows never share an automaton.
        self._rows = [_Row() if r in rows[:i] else self._rows[r] for i, r in enumerate(rows)]
        self._prompt = None

    def add_rows(self, count: int) -> None:
        self._rows = [*self._rows, *(_Row() for _ in range(count))]
        self._prompt = None

    def end(self) -> None:
        self._rows = []
        self._prompt = None

    def _check_rows(self, mine: bool) -> None:
        if not mine:
            raise LevelError(
                f"{self.name} is used by two generations at once; give each thread one of its own: "
                "copy.copy(drafter) shares the index."
            )

    def _floor(self, device: torch.device) -> float:
        if self.min_probability is not None:
            return self.min_probability
        return MIN_PROBABILITY if device.type == "cpu" else EAGER_PROBABILITY

    def _continue(self, row: _Row, ids: list[int], limit: int, floor: float) -> list[int]:
        row.search(ids, self._corpus)
        source, corpus = row.automaton, self._corpus.automaton
        state, length = source.repeated()
        if corpus is not None and row.matches and row.matches[-1][1] > length:
            source = corpus
            state, length = row.matches[-1]
        row.draft = []
        if length < self.min_match:
            return []
        doubt = row.doubt
        draft, row.draft = source.continuation(
            state, length, min(limit, self.max_tokens), floor, lambda ids: doubt * escape(ids)
        )
        return self._cut(draft)

    def _cut(self, tokens: list[int]) -> list[int]:
        """Up to and including the first id that ends the text, without ids that this chain does not know."""
        for i, token in enumerate(tokens):
            if self.vocabulary is not None and token >= self.vocabulary:
                return tokens[:i]
            if token in self.eos:
                return tokens[: i + 1]
        return tokens

    def _read_masks(self, prompt: Prompt) -> None:
        """Fetch the mask once a prompt: it may live on a device."""
        if prompt is not self._prompt:
            self._prompt = prompt
            masks = [] if prompt.mask is None else prompt.mask[:, prompt.hidden :].to(torch.long).tolist()
            self._masks = [_Mask.of(mask) for mask in masks]

    def _text(self, context: Context, b: int) -> list[int]:
        """The row's real ids: no padding, nothing that was given as an embedding."""
        ids = context.visible(b)
        if not self._masks:
            return list(ids)
        mask = self._masks[b]
        if mask.inside is None:
            return ids[mask.first :]
        return [token for token, real in zip(ids, mask.inside, strict=False) if real] + ids[len(mask.inside) :]


def _require_count(name: str, value: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} must be a whole number of 1 or more, got {value!r}.")


def _as_texts(texts: Iterable[Sequence[int]]) -> list[list[int]]:
    """The corpus as lists of ints.

    Raises:
        TypeError: not a list of lists of ints; ValueError: a negative id.
    """
    checked: list[list[int]] = []
    if not isinstance(texts, Iterable):
        raise TypeError(f"corpus must be texts as lists of token ids, got {texts!r}.")
    for i, text in enumerate(texts):
        ids = text.tolist() if hasattr(text, "tolist") else text
        if isinstance(ids, (str, bytes)) or not isinstance(ids, Iterable):
            raise TypeError(f"corpus[{i}] must be a list of token ids, got {type(text).__name__}.")
        ids = list(ids)
        for token in ids:
            if isinstance(token, bool) or not isinstance(token, int):
                raise TypeError(f"corpus[{i}] must hold token ids (int), got {type(token).__name__}.")
            if token < 0:
                raise ValueError(f"corpus[{i}] holds {token}, and a token id is never negative.")
        checked.append(ids)
    return checked
