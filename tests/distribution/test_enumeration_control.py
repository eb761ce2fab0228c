# SPDX-License-Identifier: Apache-2.0
"""Switching levels off and on and changing sizes between rounds leaves the law alone; looking at a draft does not."""

from __future__ import annotations

import pytest
from enumeration import (
    CPU,
    EXACT,
    START,
    FixedDrafter,
    OneChoice,
    OneChoiceRounds,
    Opaque,
    TableModel,
    approximations,
    context_of,
    distance,
    outcomes,
    total_variation,
    true_law,
)
from transformers import LogitsProcessor

from hf_polyspec.exactness.context import Context
from hf_polyspec.exactness.distributions import LawMaker
from hf_polyspec.exactness.proposal import Proposal
from hf_polyspec.levels.base import Drafter
from hf_polyspec.levels.causal_lm import CausalLMDrafter
from hf_polyspec.levels.emission import Emission
from hf_polyspec.levels.verifier import NoDraft, Verifier


class Switching(Verifier):
    """Asks another level in every round, chosen by all that was emitted before it."""

    ways: list[Drafter]

    def round(self, context: Context, limits: list[int], law: LawMaker) -> Emission:
        known = sum((i + 1) * (token + 1) for i, token in enumerate(context.ids[0]))
        self.source = self.ways[known % len(self.ways)]
        return super().round(context, limits, law)


def drafter(table: TableModel, tokens: int) -> Drafter:
    return CausalLMDrafter(table, name="drafter", draft_tokens=tokens)


def switching(tables: list[TableModel], rule: str, target: type[Switching] = Switching) -> Switching:
    """A target over: the whole chain, the drafter alone, the middle alone, a one-hot drafter, nothing."""
    target_table, middle, last = tables

    def over(below: Drafter, size: int) -> Drafter:
        return OneChoice(OneChoiceRounds(middle, below, name="middle", block_size=size, rule=rule))

    ways = [
        over(OneChoice(drafter(last, 2)), 2),
        OneChoice(drafter(last, 1)),
        over(NoDraft(), 2),
        FixedDrafter(),
        NoDraft(),
        OneChoice(drafter(last, 3)),
    ]
    top = target(target_table, ways[0], name="target", rule=rule)
    top.begin(0, 1, target_table.vocabulary)
    for way in ways[1:]:
        way.begin(1, 1, target_table.vocabulary)
    top.ways = ways
    return top


@pytest.mark.parametrize("rule", ["token", "block"])
@pytest.mark.parametrize("seed", [1, 2])
def test_switching_between_rounds_is_exact(rule: str, seed: int) -> None:
    tables = approximations(3, 2, seed)
    assert distance(switching(tables, rule), tables[0], 4, LawMaker([], True, CPU)) < EXACT


def test_switching_is_exact_position_by_position() -> None:
    tables = approximations(3, 2, 3)
    assert distance(switching(tables, "auto"), tables[0], 3, LawMaker([Opaque()], True, CPU)) < EXACT


class Peeking(Switching):
    """Switches the level below off after it has seen what it drew: the decision must come before the draw."""

    def round(self, context: Context, limits: list[int], law: LawMaker) -> Emission:
        self.source = self.ways[1]
        source = self.source

        class Withheld(Drafter):
            def propose(self, context: Context, limits: list[int], law: LawMaker) -> Proposal:
                drawn = source.propose(context, limits, law)
                return drawn if drawn.tokens[0] and drawn.tokens[0][0] == 0 else Proposal([[]], None, [[]])

        self.source = Withheld()
        return Verifier.round(self, context, limits, law)


def test_switching_off_after_a_look_at_the_draft_is_caught() -> None:
    tables = approximations(3, 2, 1)
    assert distance(switching(tables, "token", Peeking), tables[0], 3, LawMaker([], True, CPU)) > 0.01


# The lossy dial.


def lossy(tables: list[TableModel], budget: float, *, below: Drafter | None = None) -> Verifier:
    top = Verifier(
        tables[0], below or OneChoice(drafter(tables[1], 2)), name="target", rule="token", bias_budget=budget
    )
    top.begin(0, 1, tables[0].vocabulary)
    return top


def biased(top: Verifier, length: int, law: LawMaker) -> tuple[dict[tuple[int, ...], float], float]:
    """The law of the first tokens, and the mean of the bias reported with them."""
    done: dict[tuple[int, ...], float] = {}
    open_: dict[tuple[int, ...], float] = {(): 1.0}
    reported = 0.0
    while open_:
        following: dict[tuple[int, ...], float] = {}
        for tokens, weight in open_.items():

            def program(replay: object, tokens: tuple[int, ...] = tokens) -> tuple[object, None]:
                emission = top.round(
                    context_of(START + tokens),
                    [length - len(tokens)],
                    LawMaker(law.processors, True, CPU, replay),  # type: ignore[arg-type]
                )
                return (tuple(emission.tokens[0]), sum(emission.bias)), None

            for (more, bias), (probability, _) in outcomes(program).items():
                reported += weight * probability * bias
                place = done if len(tokens + more) >= length else following
                place[tokens + more] = place.get(tokens + more, 0.0) + weight * probability
        open_ = following
    return done, reported


@pytest.mark.parametrize("processors", [[], [Opaque()]], ids=["at once", "in step"])
@pytest.mark.parametrize("one_hot", [False, True])
def test_the_bias_of_a_text_is_at_most_what_is_reported(processors: list[LogitsProcessor], one_hot: bool) -> None:
    tables = approximations(3, 2 if processors else 3, 5)
    law, exact = LawMaker(processors, True, CPU), true_law(tables[0], START, 3)
    before = 0.0
    for budget in (0.0, 0.3, 1.0):
        emitted, reported = biased(lossy(tables, budget, below=FixedDrafter() if one_hot else None), 3, law)
        found = total_variation(emitted, exact)
        if budget == 0:
            assert found < EXACT
            assert reported == 0
        else:
            assert before + 0.01 < found <= reported + EXACT
        before = found


def test_one_judged_token_is_exactly_as_far_from_its_law_as_reported() -> None:
    """Theorem 5 of Yin et al.: lambda TV(p, q), no more and no less."""
    tables = approximations(3, 3, 5)
    for budget in (0.25, 0.5, 1.0):
        top = lossy(tables, budget, below=OneChoice(drafter(tables[1], 1)))

        def program(replay: object, top: Verifier = top) -> tuple[object, float]:
            emission = top.round(context_of(START), [2], LawMaker([], True, CPU, replay))  # type: ignore[arg-type]
            return tuple(emission.tokens[0][:1]), emission.bias[0]

        found = outcomes(program)
        emitted = {tokens: probability for tokens, (probability, _) in found.items()}
        distance_found = total_variation(emitted, true_law(tables[0], START, 1))
        p, q = tables[0].law(START), tables[1].law(START)
        assert distance_found == pytest.approx(budget * 0.5 * float((p - q).abs().sum()), abs=1e-12)
        assert {round(bias - distance_found, 12) for _, bias in found.values()} == {0.0}


def test_a_budget_that_forgets_what_it_introduced_would_be_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reporting half of it is no bound for one token."""
    from hf_polyspec.exactness import judgement

    genuine = judgement._introduced
    monkeypatch.setattr(judgement, "_introduced", lambda *given: [0.5 * bias for bias in genuine(*given)])
    tables = approximations(3, 3, 5)
    emitted, reported = biased(lossy(tables, 1.0, below=OneChoice(drafter(tables[1], 1))), 2, LawMaker([], True, CPU))
    assert total_variation(emitted, true_law(tables[0], START, 2)) > reported
