# SPDX-License-Identifier: Apache-2.0
"""The automaton against brute force over the text, undoing against building anew, and its cost counted."""

from __future__ import annotations

import gc
import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_polyspec.levels import suffix_automaton
from hf_polyspec.levels.suffix_automaton import ROOT, SEPARATOR, SuffixAutomaton

TEXTS = st.lists(st.integers(0, 3), max_size=18)


def ends_of(text: list[int], part: list[int]) -> list[int]:
    """Where `part` ends in `text`."""
    return [i for i in range(len(part), len(text) + 1) if text[i - len(part) : i] == part]


def longest_repeated(text: list[int]) -> int:
    return next(n for n in reversed(range(len(text) + 1)) if n == 0 or len(ends_of(text, text[-n:])) > 1)


def likeliest_after(text: list[int], part: list[int]) -> int:
    """The id that followed `part` most often, of equals the one that followed last."""
    followers = [text[end] for end in ends_of(text, part) if end < len(text)]
    counts = Counter(followers)
    latest = {token: i for i, token in enumerate(followers)}
    return max(counts, key=lambda token: (counts[token], latest[token]), default=-1)


def built(text: list[int], undo: int = 512) -> SuffixAutomaton:
    automaton = SuffixAutomaton(undo)
    automaton.extend(text)
    return automaton


def contents(automaton: SuffixAutomaton) -> tuple[object, ...]:
    a = automaton
    return a.size, a.last, a.lengths, a.links, a.edges, a.counts, a.likeliest


@given(TEXTS)
def test_longest_repeated_suffix_is_that_of_brute_force(text: list[int]) -> None:
    automaton = SuffixAutomaton()
    for i, token in enumerate(text):
        automaton.append(token)
        state, length = automaton.repeated()
        assert length == longest_repeated(text[: i + 1])
        assert automaton.lengths[state] == length


@given(TEXTS)
def test_counts_and_likeliest_followers_are_those_of_brute_force(text: list[int]) -> None:
    automaton = built(text)
    for start in range(len(text)):
        for end in range(start + 1, len(text) + 1):
            state = ROOT
            for token in text[start:end]:
                state = automaton.edges[state][token]
            assert automaton.counts[state] == len(ends_of(text, text[start:end]))
            assert automaton.likeliest[state] == likeliest_after(text, text[start:end])


@given(st.lists(TEXTS, min_size=1, max_size=3), TEXTS)
def test_following_another_text_finds_its_longest_known_suffix(corpus: list[list[int]], text: list[int]) -> None:
    automaton = SuffixAutomaton(undo=0)
    for part in corpus:
        automaton.extend(part)
        automaton.append(SEPARATOR)
    state, length = ROOT, 0
    for end in range(1, len(text) + 1):
        state, length = automaton.step(state, length, text[end - 1])
        known = [n for n in range(end + 1) if n == 0 or any(ends_of(part, text[end - n : end]) for part in corpus)]
        assert length == max(known)
        walked = ROOT
        for token in text[end - length : end]:
            walked = automaton.edges[walked][token]
        assert state == walked


@given(st.lists(st.one_of(st.integers(0, 2), st.integers(-6, -1)), max_size=40))
@settings(max_examples=200)
def test_taking_back_leaves_what_a_fresh_automaton_has(actions: list[int]) -> None:
    automaton, text = SuffixAutomaton(), []
    for action in actions:
        if action >= 0:
            automaton.append(action)
            text.append(action)
        else:
            count = min(-action, len(text))
            automaton.pop(count)
            del text[len(text) - count :]
        assert contents(automaton) == contents(built(text))


def test_only_remembered_appends_can_be_taken_back() -> None:
    automaton = built([1, 2, 1, 2, 3], undo=2)
    assert automaton.undoable == 2
    with pytest.raises(IndexError, match="the last 2 can"):
        automaton.pop(3)
    assert contents(automaton) == contents(built([1, 2, 1, 2, 3]))
    automaton.pop(2)
    assert contents(automaton) == contents(built([1, 2, 1]))


@given(TEXTS)
def test_it_is_no_larger_than_theory_allows(text: list[int]) -> None:
    automaton = built(text)
    if len(text) >= 3:
        assert len(automaton.lengths) <= 2 * len(text) - 1
        assert sum(len(edges) for edges in automaton.edges) <= 3 * len(text) - 4


def continued(text: list[int], limit: int = 8, floor: float = 0.0, doubt: float = 0.0) -> list[int]:
    """What follows the end of a text; beside what was seen after a match of n ids, `doubt` / n count as never seen."""
    automaton = built(text)
    return automaton.continuation(*automaton.repeated(), limit, floor, lambda ids: doubt / ids)[0]


def test_continuation_prefers_the_most_frequent_and_of_equals_the_latest() -> None:
    assert continued([1, 5, 1, 6, 1, 5, 9, 1], limit=1) == [5]
    assert continued([1, 5, 1, 6, 9, 1], limit=1) == [6]


def test_continuation_uses_the_context_it_has_walked() -> None:
    # After 2 comes 8 most often, but after 7, 2 it was 3.
    assert continued([7, 2, 3, 2, 8, 2, 8, 2, 8, 7], limit=2) == [2, 3]


def test_a_loop_is_continued_around() -> None:
    assert continued([4, 1, 2, 3, 1, 2, 3, 1], limit=8) == [2, 3, 1, 2, 3, 1, 2, 3]


def test_continuation_ends_where_it_becomes_unlikely() -> None:
    text = [1, 2, 3, 1, 2, 4, 1, 2, 5, 1]  # after 1 always 2, then a third each
    assert continued(text, limit=2, floor=0.5) == [2]
    assert continued(text, limit=2, floor=0.3) == [2, 5]
    assert continued([1, 2, 3], floor=0.0) == []
    assert continued([], floor=0.0) == []


@pytest.mark.parametrize(("floor", "kept"), [(0.51, 0), (0.34, 1), (0.26, 2), (0.24, 3)])
def test_what_was_never_seen_counts_less_the_longer_the_match(floor: float, kept: int) -> None:
    # 1/2 after one id, then 2/3 after two and 3/4 after three.
    assert continued([1, 2, 3, 9, 1], limit=3, floor=floor, doubt=1.0) == [2, 3, 9][:kept]


class CountingList(list):
    """Counts reads; what is appended counts by its size, so that copying a dict costs its entries."""

    reads = 0

    def __getitem__(self, key):
        CountingList.reads += 1
        return super().__getitem__(key)

    def append(self, value):
        CountingList.reads += 1 + (len(value) if isinstance(value, dict) else 0)
        super().append(value)


def reads_per_token(text: list[int]) -> float:
    automaton = SuffixAutomaton()
    for column in ("lengths", "links", "edges", "counts", "likeliest"):
        setattr(automaton, column, CountingList(getattr(automaton, column)))
    CountingList.reads = 0
    automaton.extend(text)
    return CountingList.reads / len(text)


def words(length: int) -> list[int]:
    """Like text: a few frequent ids, many rare ones, and passages that come back."""
    coins, text = random.Random(7), []
    while len(text) < length:
        if text and coins.random() < 0.05:
            start = coins.randrange(len(text))
            text.extend(text[start : start + 30])
        else:
            text.append(int(coins.paretovariate(0.6)))
    return text[:length]


def binary(length: int) -> list[int]:
    coins = random.Random(3)
    return [coins.randrange(2) for _ in range(length)]


def loop(length: int) -> list[int]:
    return [i % 4 for i in range(length)]


def runs(length: int) -> list[int]:
    """Long runs of one id, each broken by a new one: the longest walks there are."""
    return [0 if i % 64 else i for i in range(length)]


@pytest.mark.parametrize("kind", [words, binary, loop, runs])
def test_cost_of_a_token_stays_flat(kind) -> None:
    short, long = reads_per_token(kind(500)), reads_per_token(kind(4_000))
    assert long < 1.25 * short + 8
    assert long < 300


def test_the_cost_count_notices_unbounded_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(suffix_automaton, "COUNTED", 10**9)
    assert reads_per_token(loop(1_600)) > 3 * reads_per_token(loop(400))


def test_a_text_leaves_nothing_that_garbage_collection_has_to_look_through() -> None:
    def containers(length: int) -> int:
        found: dict[int, object] = {}
        automaton = SuffixAutomaton()
        automaton.extend(words(length))
        automaton.pop(20)
        reached: list[object] = list(vars(automaton).values())
        while reached:
            found |= {id(one): one for one in reached if gc.is_tracked(one) and not isinstance(one, dict)}
            reached = [one for one in gc.get_referents(*reached) if id(one) not in found and not isinstance(one, int)]
        return len(found)

    assert containers(900) == containers(30)
