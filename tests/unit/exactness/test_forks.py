# SPDX-License-Identifier: Apache-2.0
"""How levels below come by a processor's state: by the cheapest way that the object allows, and only when they ask."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LogitsProcessor, PrefixConstrainedLogitsProcessor, TemperatureLogitsWarper

from hf_polyspec.exactness.context import Context, Prompt
from hf_polyspec.exactness.distributions import LawMaker
from hf_polyspec.exactness.forks import AllowedTokens, Lent, duplicate

VOCABULARY = 12
CPU = torch.device("cpu")


class Matcher:
    """Counts tokens; cannot be copied, as objects of compiled libraries cannot."""

    def __init__(self, taken: tuple[int, ...] = ()) -> None:
        self.taken = list(taken)

    def accept_token(self, token: int) -> bool:
        if token >= VOCABULARY - 1:
            return False
        self.taken.append(token)
        return True

    def __deepcopy__(self, memo: Any) -> Any:
        raise TypeError("cannot pickle 'Matcher' object")


class GoesBack(Matcher):
    def rollback(self, num_tokens: int = 1) -> None:
        assert 0 < num_tokens <= len(self.taken)
        del self.taken[len(self.taken) - num_tokens :]


class Forks(GoesBack):
    def fork(self) -> Forks:
        return Forks(tuple(self.taken))


class DeepCopies(Matcher):
    def consume_token(self, token: int) -> bool:
        return self.accept_token(token)

    def deep_copy(self) -> DeepCopies:
        return DeepCopies(tuple(self.taken))


class Grammar(LogitsProcessor):
    """Takes in the last id at every call but the first, and allows one id in three by what it has taken."""

    def __init__(self, matcher: Any, depth: int = 0) -> None:
        self.inner: Any = {"matchers": [matcher]}
        for _ in range(depth):
            self.inner = [self.inner]
        self.depth = depth
        self.begun = False

    @property
    def matcher(self) -> Any:
        inner = self.inner
        for _ in range(self.depth):
            inner = inner[0]
        return inner["matchers"][0]

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if self.begun:
            self.matcher.accept_token(int(input_ids[0, -1]))
        self.begun = True
        allowed = torch.arange(VOCABULARY) % 3 == sum(self.matcher.taken) % 3
        return torch.where(allowed, scores, float("-inf"))


def ask(law: LawMaker, *ids: int) -> list[bool]:
    """Which ids the law allows after these."""
    scores = law.scores_at(torch.tensor([ids]), torch.zeros(1, VOCABULARY))
    return torch.isfinite(scores[0]).tolist()


@pytest.mark.parametrize("kind", [GoesBack, Forks, DeepCopies])
@pytest.mark.parametrize("depth", [0, 3])
def test_levels_below_walk_ahead_and_the_target_stays_where_it_is(kind, depth):
    """Three laws in a row, as in a chain of three; each is asked further than the one above it."""
    grammar = Grammar(kind(), depth)
    target = LawMaker([grammar, TemperatureLogitsWarper(0.5)], False, CPU)
    alone = LawMaker([Grammar(kind())], False, CPU)
    text = [5, 4, 7, 2, 3, 6]
    wanted = [ask(alone, *text[: n + 1]) for n in range(len(text))]
    assert len({tuple(one) for one in wanted}) > 1
    assert ask(target, 5) == wanted[0]
    for first in (1, 3):  # two rounds
        middle = target.fork(1)
        lowest = middle.fork(1)
        assert [ask(lowest, *text[: first + n + 1]) for n in range(3)] == wanted[first : first + 3]
        middle.settle()
        assert ask(middle, *text[: first + 1]) == wanted[first]
        again = middle.fork(1)
        assert ask(again, *text[: first + 2]) == wanted[first + 1]
        middle.settle()
        assert ask(middle, *text[: first + 2]) == wanted[first + 1]
        target.settle()
        assert grammar.matcher.taken == text[1:first]
        assert ask(target, *text[: first + 1]) == wanted[first]
        assert ask(target, *text[: first + 2]) == wanted[first + 1]
    assert not target.left_out


def test_a_law_above_that_is_asked_takes_back_what_it_lent():
    grammar = Grammar(GoesBack())
    target = LawMaker([grammar], False, CPU)
    ask(target, 5)
    below = target.fork(1)
    ask(below, 5, 4)
    assert grammar.matcher.taken == [4], "it is walked itself"
    ask(target, 5, 7)
    assert grammar.matcher.taken == [7]


def test_a_lent_matcher_counts_what_was_taken_and_not_what_was_refused():
    matcher = GoesBack((1,))
    lent = Lent(matcher)
    assert lent.accept_token(2)
    assert not lent.accept_token(VOCABULARY)
    lent.accept_token(3)
    lent.rollback(1)
    further = Lent(lent)
    further.accept_token(4)
    assert matcher.taken == [1, 2, 4]
    lent.give_back()
    assert matcher.taken == [1]
    further.give_back()
    lent.give_back()
    assert matcher.taken == [1]
    assert lent.taken == [1], "everything else is the matcher's own"


def test_what_cannot_be_had_is_left_out_once_and_said():
    class WithModel(Grammar):
        def __init__(self) -> None:
            super().__init__(Forks())
            self.judge = nn.Linear(1, 1)

    for processor, reason in (
        (Grammar(Matcher()), "cannot be copied (TypeError)"),
        (WithModel(), "a model of its own"),
    ):
        law = LawMaker([processor], False, CPU)
        ask(law, 5)
        below = law.fork(1)
        assert all(ask(below, 5, 4)), "nothing is forbidden where the grammar is not known"
        ((name, said),) = law.left_out.items()
        assert name.endswith(type(processor).__qualname__)
        assert reason in said
        assert below.fork(1).left_out is law.left_out


def test_nothing_is_copied_for_a_level_that_asks_nothing():
    class Counted(LogitsProcessor):
        copies = 0

        def __deepcopy__(self, memo: Any) -> Any:
            Counted.copies += 1
            return type(self)()

        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            return scores

    law = LawMaker([Counted()], False, CPU)
    ask(law, 5)
    middle = law.fork(1)
    middle.fork(1)
    assert Counted.copies == 0
    ask(middle, 5, 4)
    ask(middle, 5, 4, 3)
    assert Counted.copies == 1


def test_shared_parts_are_not_copied():
    class CompiledGrammar:
        def __deepcopy__(self, memo: Any) -> Any:
            raise TypeError("cannot pickle")

    CompiledGrammar.__module__ = "xgrammar.compiler"

    class Tokenizer:
        def convert_ids_to_tokens(self, ids: Any) -> Any:
            return ids

    grammar = Grammar(Forks())
    grammar.compiled, grammar.tokenizer, grammar.text = [CompiledGrammar()], {"own": Tokenizer()}, [1, 2]
    own, lent, _ = duplicate(grammar)
    assert own is not None
    assert not lent
    assert own.compiled[0] is grammar.compiled[0]
    assert own.tokenizer["own"] is grammar.tokenizer["own"]
    assert own.text == grammar.text
    assert own.text is not grammar.text
    assert own.matcher is not grammar.matcher


def function(asked: list[tuple[int, ...]]) -> Any:
    def allowed(row: int, ids: torch.Tensor) -> list[int]:
        asked.append((row, *ids.tolist()))
        return [token for token in range(VOCABULARY) if token % 3 == (row + len(ids)) % 3]

    return allowed


def test_a_function_of_the_ids_is_asked_itself():
    asked: list[tuple[int, ...]] = []
    holder = function(asked)
    law = LawMaker([PrefixConstrainedLogitsProcessor(holder, 1)], False, CPU)
    below = law.fork(1).fork(1)
    assert ask(below, 5, 4) == [token % 3 == 2 for token in range(VOCABULARY)]
    assert asked == [(0, 5, 4)]
    assert below.processors[0] is law.processors[0]


def test_rows_that_run_apart_ask_under_their_own_place_and_not_behind_an_end():
    """A function that knows a text only from its beginning is asked about shorter texts first."""
    asked: list[tuple[int, ...]] = []
    law = LawMaker([PrefixConstrainedLogitsProcessor(function(asked), 1)], False, CPU, ends={9})
    below = law.fork(2)
    assert not below.in_order
    assert isinstance(below.processors[0], AllowedTokens)
    rows = Context([[5, 4, 7], [5, 6]], Prompt(2, None, torch.arange(2).expand(2, -1)))
    scores = below.scores(rows, [[3], [2, 9]], torch.zeros(2, 3, VOCABULARY))
    assert sorted(asked) == [(0, 5, 4, 7), (0, 5, 4, 7, 3), (1, 5, 6), (1, 5, 6, 2)]
    assert [len(one) for one in asked] == sorted(len(one) for one in asked)
    for row, place, rest in ((0, 0, 0), (0, 1, 1), (1, 0, 0), (1, 1, 1)):
        assert torch.isfinite(scores[row, place]).tolist() == [token % 3 == rest for token in range(VOCABULARY)]
    assert not law.left_out


def test_in_a_batch_other_processors_with_state_are_left_out_and_named():
    law = LawMaker([Grammar(Forks()), TemperatureLogitsWarper(0.5)], False, CPU)
    below = law.fork(2)
    assert [type(one) for one in below.processors] == [TemperatureLogitsWarper]
    assert list(law.left_out.values()) == ["rows of a batch run apart"]


def test_a_plain_copy_is_independent():
    class Plain(LogitsProcessor):
        def __init__(self) -> None:
            self.calls: list[int] = []

        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            self.calls.append(int(input_ids[0, -1]))
            return scores

    mine = Plain()
    law = LawMaker([mine], False, CPU)
    ask(law, 5)
    below = law.fork(1)
    ask(below, 5, 4)
    assert mine.calls == [5]
    assert below.processors[0].calls == [5, 4]
    assert copy.deepcopy(mine).calls == [5]
