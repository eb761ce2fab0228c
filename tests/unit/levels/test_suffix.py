# SPDX-License-Identifier: Apache-2.0
"""The suffix drafter: what it proposes, that it forgets what was rolled back, and what a rollback costs."""

from __future__ import annotations

import copy
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_polyspec.errors import LevelError
from hf_polyspec.exactness.context import EMBEDDED, Context, Prompt
from hf_polyspec.exactness.distributions import LawMaker
from hf_polyspec.levels.suffix import MIN_PROBABILITY, MOST_DOUBT, SuffixDrafter, escape
from hf_polyspec.levels.suffix_automaton import CHANGE

LAW = LawMaker([], False, torch.device("cpu"))
IDS = st.lists(st.integers(0, 3), min_size=1, max_size=16)


def context(*rows: list[int], mask: list[list[int]] | None = None, embedded: int = 0) -> Context:
    width = min(len(row) for row in rows)
    return Context(
        list(rows),
        Prompt(
            width,
            None if mask is None else torch.tensor(mask),
            torch.arange(width).expand(len(rows), -1),
            torch.zeros(len(rows), embedded, 4) if embedded else None,
        ),
    )


def begun(*, batch: int = 1, vocabulary: int = 1000, **options: object) -> SuffixDrafter:
    """One whose drafts end for no doubt, unless a test asks for it."""
    drafter = SuffixDrafter(**{"min_probability": 0.0, **options})
    drafter.begin(2, batch, vocabulary)
    return drafter


def drafts(drafter: SuffixDrafter, where: Context, limit: int = 50) -> list[list[int]]:
    return drafter.propose(where, [limit] * where.batch, LAW).tokens


def test_a_proposal_continues_the_repeated_suffix_and_says_nothing_was_drawn() -> None:
    drafter = begun()
    proposal = drafter.propose(context([5, 6, 7, 8, 9, 1, 5, 6]), [3], LAW)
    assert proposal.tokens == [[7, 8, 9]]
    assert proposal.q is None
    assert proposal.origins == [[2, 2, 2]]
    assert drafter.stats.drafted == 3


def likely(length: int, doubt: float = 1.0) -> int:
    """Tokens until a continuation seen once is less likely than `MIN_PROBABILITY`."""
    count, chance = 0, 1.0
    while (chance := chance / (1 + doubt * escape(length + count))) >= MIN_PROBABILITY:
        count += 1
    return count


def doubting(**options: object) -> SuffixDrafter:
    return begun(min_probability=MIN_PROBABILITY, **options)


def test_longer_matches_earn_longer_drafts() -> None:
    body = list(range(10, 90))
    lengths = [len(drafts(doubting(), context([*body, 1, *body[:n]]))[0]) for n in (1, 2, 3, 30)]
    assert lengths == [likely(1), likely(2), likely(3), 24]
    assert 0 < lengths[0] < lengths[1] < lengths[2] < 24
    assert len(drafts(doubting(max_tokens=6), context([*body, 1, *body[:30]]))[0]) == 6
    assert len(drafts(begun(), context([*body, 1, 10]))[0]) == 24
    assert drafts(doubting(min_match=2), context([*body, 1, body[0]])) == [[]]


def test_what_came_again_more_often_earns_longer_drafts() -> None:
    once, twice = [1, *range(10, 40), 2, 1], [1, *range(10, 40), 2, 1, *range(10, 40), 3, 1]
    assert len(drafts(doubting(), context(once))[0]) < len(drafts(doubting(), context(twice))[0])


def test_nothing_is_proposed_without_a_match_or_without_room() -> None:
    drafter = begun(batch=2)
    assert drafts(drafter, context([1, 2, 3], [4, 5, 6])) == [[], []]
    assert drafter.propose(context([1, 2, 1], [4, 5, 4]), [0, 1], LAW).tokens == [[], [5]]
    assert drafts(begun(), Context([[]], Prompt(0, None, torch.zeros(1, 0)))) == [[]]


@given(st.lists(st.tuples(st.integers(0, 40), IDS), min_size=1, max_size=8), st.lists(IDS, max_size=2))
@settings(max_examples=150, deadline=None)
def test_after_any_rollback_it_proposes_what_a_fresh_drafter_does(
    moves: list[tuple[int, list[int]]], corpus: list[list[int]]
) -> None:
    used, ids = begun(corpus=corpus), list[int]()
    for back, more in moves:
        ids = ids[: max(0, len(ids) - back)] + more
        assert drafts(used, context(ids)) == drafts(begun(corpus=corpus), context(ids))


def test_rollback_beyond_what_can_be_undone() -> None:
    coins = random.Random(5)
    ids = [coins.randrange(4) for _ in range(1500)]
    drafter = begun()
    for end in (1500, 300, 1400, 1000, 999, 487, 1500):
        assert drafts(drafter, context(ids[:end])) == drafts(begun(), context(ids[:end]))


def test_a_chain_that_rolls_back_every_round_costs_the_same_per_token_at_any_length(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    work = 0

    def counted(name: str):
        original = getattr(suffix_automaton_class, name)

        def call(self, *arguments):
            nonlocal work
            before = self._forgotten + len(self._changes)
            original(self, *arguments)
            work += abs(self._forgotten + len(self._changes) - before) // CHANGE

        monkeypatch.setattr(suffix_automaton_class, name, call)

    suffix_automaton_class = type(begun()._rows[0].automaton)
    counted("append")
    counted("pop")
    coins, costs = random.Random(11), []
    for length in (1_000, 4_000):
        text = [int(coins.paretovariate(0.6)) for _ in range(length + 400)]
        drafter = begun()
        drafts(drafter, context(text[:length]))
        work = 0
        for end in range(length, length + 400, 4):
            # A middle collects 12 tokens, of which the target keeps 4.
            wrong = [int(coins.paretovariate(0.6)) for _ in range(8)]
            drafts(drafter, context(text[: end + 4] + wrong))
        costs.append(work / 100)
    assert costs[1] < 1.3 * costs[0]
    assert costs[1] < 12 * 2 * 30  # not a walk through the text


def test_left_padding_is_no_text() -> None:
    padded = context([0, 0, 0, 7, 8, 7], [5, 0, 0, 5, 0, 0], mask=[[0, 0, 0, 1, 1, 1], [1] * 6])
    drafter = begun(batch=2)
    assert drafts(drafter, padded, limit=2) == [[8, 7], [5, 0]]
    # Had the padding counted, 0 would have been seen before.
    grown = Context([[0, 0, 0, 7, 8, 7, 0], padded.ids[1]], padded.prompt)
    assert drafts(drafter, grown, limit=2)[0] == []


def test_masked_columns_in_the_middle_and_fully_masked_rows() -> None:
    assert drafts(begun(), context([7, 0, 8, 9, 7, 8], mask=[[1, 0, 1, 1, 1, 1]]), limit=1) == [[9]]
    blank = context([0, 0, 0], mask=[[0, 0, 0]])
    assert drafts(begun(), blank) == [[]]
    assert drafts(begun(), Context([[0, 0, 0, 4, 5, 4]], blank.prompt), limit=1) == [[5]]


def test_embedded_positions_are_skipped_together_with_their_mask() -> None:
    ids = [EMBEDDED] * 3 + [7, 8, 9, 7]
    embedded = context(ids, mask=[[0, 1, 1, 1, 1, 1, 1]], embedded=3)
    assert drafts(begun(), embedded, limit=2) == [[8, 9]]


def test_rows_do_not_know_each_other() -> None:
    rows = [[1, 2, 3, 1], [1, 4, 5, 1], [2, 3, 2, 4]]
    together = drafts(begun(batch=3), context(*rows))
    assert together == [drafts(begun(), context(row))[0] for row in rows]


def test_rows_that_go_on_keep_their_texts_and_doubts() -> None:
    rows = [[*range(20, 60), 1, 20, 21, 22], [2, 3, 2], [*range(70, 110), 1, 70, 71, 72]]
    drafter = begun(batch=3, min_probability=MIN_PROBABILITY)
    for _ in range(40):
        drafts(drafter, context(*rows))
        drafter.observe([4, 0, 4], [0, 0, 4])
    drafter.keep_rows([2, 0])
    kept = [len(row) for row in drafts(drafter, context(rows[2], rows[0]))]
    assert kept[0] > likely(3) > kept[1] > 0
    drafter.keep_rows([0, 0])
    both = drafts(drafter, context(rows[2], rows[2]))
    assert len(both[0]) == kept[0]
    assert both[1] == both[0][: likely(3)] == list(range(73, 73 + likely(3)))


def test_a_new_generation_forgets_the_texts_but_not_the_corpus() -> None:
    drafter = begun(corpus=[[50, 51, 52, 53]])
    drafts(drafter, context([1, 2, 3, 1]))
    drafter.observe([3], [0])
    drafter.end()
    drafter.begin(1, 2, 1000)
    assert drafts(drafter, context([9, 1], [9, 50])) == [[], [51, 52, 53]]
    assert drafter.stats.drafted == 3
    assert drafter.stats.index == 1


def test_the_longer_match_wins_and_the_row_wins_a_tie() -> None:
    corpus = [[1, 2, 80, 81]]
    assert drafts(begun(corpus=corpus), context([2, 70, 1, 2]), limit=1) == [[80]]
    assert drafts(begun(corpus=corpus), context([1, 2, 70, 1, 2]), limit=1) == [[70]]
    # The end of one text is never continued by the next.
    assert drafts(begun(corpus=[[1, 2], [3, 4]]), context([9, 2])) == [[]]


def test_the_corpus_can_grow_and_bad_texts_change_nothing() -> None:
    drafter = begun()
    assert drafts(drafter, context([1, 60])) == [[]]
    drafter.learn([[60, 61, 62]])
    assert drafts(drafter, context([1, 60])) == [[61, 62]]
    with pytest.raises(ValueError, match=r"corpus\[1\] holds -3"):
        drafter.learn([[61, 99], [-3]])
    assert drafts(drafter, context([1, 61])) == [[62]]


def test_drafts_end_with_the_text_and_hold_only_ids_of_the_chain() -> None:
    ids = [4, 5, 6, 2, 7, 8, 4]
    assert drafts(begun(eos=[2]), context(ids)) == [[5, 6, 2]]
    assert drafts(begun(), context(ids), limit=5) == [[5, 6, 2, 7, 8]]
    assert drafts(begun(corpus=[[4, 5, 300, 6]], vocabulary=300), context([9, 4])) == [[5]]


def test_drafts_shrink_with_rejections_and_grow_with_acceptance_but_long_matches_always_get_one() -> None:
    body = list(range(10, 60))
    ids = [*body, 1, *body[:3]]
    drafter = doubting()
    first = len(drafts(drafter, context(ids))[0])
    for _ in range(200):
        proposed = len(drafts(drafter, context(ids))[0])
        drafter.observe([proposed], [0])
    assert first == likely(3)
    assert proposed == likely(3, MOST_DOUBT) == 1
    assert drafts(drafter, context([*body, 1, 10])) == [[]]
    drafter.observe([0], [0])  # nothing proposed, nothing learnt
    assert len(drafts(drafter, context(ids))[0]) == proposed
    for _ in range(2000):
        proposed = len(drafts(drafter, context(ids))[0])
        drafter.observe([proposed], [proposed])
    assert proposed == min(24, likely(3, 1 / MOST_DOUBT)) > first


def test_what_was_not_checked_is_not_held_against_a_draft() -> None:
    body = list(range(10, 60))
    ids = [*body, 1, *body[:3]]
    one, other = doubting(), doubting()
    for _ in range(50):
        proposed = len(drafts(one, context(ids))[0])
        drafts(other, context(ids))
        one.observe([proposed], [0])
        other.observe([0], [0])
    assert len(drafts(one, context(ids))[0]) < len(drafts(other, context(ids))[0]) == likely(3)


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"min_match": 0}, ValueError, "min_match must be a whole number of 1 or more, got 0"),
        ({"max_tokens": True}, ValueError, "max_tokens must be a whole number"),
        ({"min_probability": 1.5}, ValueError, "min_probability must be a number from 0 to 1"),
        ({"corpus": ["some text"]}, TypeError, r"corpus\[0\] must be a list of token ids, got str"),
        ({"corpus": [1, 2, 3]}, TypeError, r"corpus\[0\] must be a list of token ids, got int"),
        ({"corpus": [[1, 2.5]]}, TypeError, r"corpus\[0\] must hold token ids \(int\), got float"),
        ({"corpus": "text"}, TypeError, "must be a list of token ids"),
    ],
)
def test_bad_input_gets_one_sentence(options: dict[str, object], error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        SuffixDrafter(**options)


def test_tensors_are_texts_too() -> None:
    assert drafts(begun(corpus=torch.tensor([[1, 2, 3], [4, 5, 6]])), context([9, 4])) == [[5, 6]]


def test_two_generations_at_once_are_told_apart_or_refused() -> None:
    first = begun(corpus=[[7, 8, 9, 10]])
    second = copy.copy(first)
    second.begin(2, 2, 1000)
    assert second.corpus is first.corpus
    assert drafts(first, context([7, 8])) == [[9, 10]]
    assert drafts(second, context([1, 2, 1], [8, 9, 8]), limit=2) == [[2, 1], [9, 8]]
    first.observe([2], [1])
    second.observe([2, 2], [2, 0])
    second.keep_rows([1])
    assert drafts(first, context([7, 8, 9])) == [[10]]
    first.begin(2, 3, 1000)  # another thread's generation, with the same object
    for call in (lambda: first.observe([2], [1]), lambda: first.keep_rows([3])):
        with pytest.raises(LevelError, match=r"used by two generations at once; .* copy\.copy\(drafter\)"):
            call()


def test_what_is_learnt_in_the_middle_of_a_text_counts_at_once_for_all_that_share_the_corpus() -> None:
    """A state that a row stands in may be split by it: what follows 2 is then no longer what follows 1, 2."""
    first = begun(corpus=[[1, 2, 3]])
    second = copy.copy(first)
    second.begin(1, 1, 1000)
    assert drafts(first, context([7, 2]), limit=1) == drafts(second, context([7, 2]), limit=1) == [[3]]
    first.learn([[5, 2, 8]])
    for drafter in (first, second, begun(corpus=[[1, 2, 3], [5, 2, 8]])):
        assert drafts(drafter, context([7, 2]), limit=1) == [[8]]
        assert drafts(drafter, context([1, 2]), limit=1) == [[3]]
