# SPDX-License-Identifier: Apache-2.0
"""The chain emits the target's law exactly: every outcome of every coin, total variation below 1e-9.

The wrong variants at the end are the mistakes of published code; the same harness must see each of them.
"""

from __future__ import annotations

import itertools

import pytest
import torch
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
    sampling,
    true_law,
)

from hf_polyspec.exactness import judgement as judgement_module
from hf_polyspec.exactness.context import Context
from hf_polyspec.exactness.distributions import LawMaker
from hf_polyspec.exactness.proposal import Proposal
from hf_polyspec.exactness.verification import Verdict
from hf_polyspec.levels.base import Drafter
from hf_polyspec.levels.causal_lm import CausalLMDrafter
from hf_polyspec.levels.emission import Emission
from hf_polyspec.levels.verifier import Verifier


def lm_drafter(model: TableModel, draft_tokens: int = 2, confidence: float = 0.0) -> CausalLMDrafter:
    return CausalLMDrafter(model, name="drafter", draft_tokens=draft_tokens, confidence_threshold=confidence)


def chain(
    tables: list[TableModel],
    rules: tuple[str, ...],
    *,
    drafter: Drafter | None = None,
    middle: type[Verifier] = OneChoiceRounds,
    target: type[Verifier] = Verifier,
    block_size: int = 2,
    eos: frozenset[int] = frozenset(),
) -> Verifier:
    level: Drafter = OneChoice(drafter or lm_drafter(tables[-1]))
    verifiers = tables if drafter is not None and not isinstance(drafter, CausalLMDrafter) else tables[:-1]
    for table, rule in reversed(list(zip(verifiers[1:], rules[1:], strict=True))):
        level = OneChoice(middle(table, level, name="middle", block_size=block_size, rule=rule, eos=eos))
    top = target(tables[0], level, name="target", rule=rules[0], eos=eos)
    top.begin(0, 1, tables[0].vocabulary)
    return top


@pytest.mark.parametrize("rule", ["token", "block"])
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_two_models(rule: str, seed: int) -> None:
    tables = approximations(2, 3, seed)
    assert distance(chain(tables, (rule,), drafter=lm_drafter(tables[-1], 3)), tables[0], 4) < EXACT


@pytest.mark.parametrize("rules", list(itertools.product(["token", "block"], repeat=2)))
@pytest.mark.parametrize(("vocabulary", "block_size", "seed"), [(3, 2, 1), (2, 3, 2)])
def test_three_models(rules: tuple[str, ...], vocabulary: int, block_size: int, seed: int) -> None:
    tables = approximations(3, vocabulary, seed)
    assert distance(chain(tables, rules, block_size=block_size), tables[0], 3) < EXACT


@pytest.mark.parametrize("rules", list(itertools.product(["token", "block"], repeat=3)))
def test_four_models(rules: tuple[str, ...]) -> None:
    tables = approximations(4, 2, 5)
    assert distance(chain(tables, rules), tables[0], 3) < EXACT


@pytest.mark.parametrize("rules", [("auto", "auto"), ("token", "token")])
def test_one_hot_drafter(rules: tuple[str, ...]) -> None:
    tables = approximations(2, 3, 7)
    assert distance(chain(tables, rules, drafter=FixedDrafter()), tables[0], 3) < EXACT


@pytest.mark.parametrize("rules", [("token", "token"), ("block", "block")])
def test_blocks_that_end_at_an_end_of_text(rules: tuple[str, ...]) -> None:
    tables = approximations(3, 3, 11)
    assert distance(chain(tables, rules, block_size=3, eos=frozenset({1})), tables[0], 3) < EXACT


@pytest.mark.parametrize("rule", ["token", "block"])
def test_stopping_after_an_unsure_token_is_exact(rule: str) -> None:
    tables = approximations(2, 3, 13)
    top = chain(tables, (rule,), drafter=lm_drafter(tables[-1], 3, confidence=0.45))
    assert distance(top, tables[0], 3) < EXACT


@pytest.mark.parametrize("rule", ["token", "block"])
@pytest.mark.parametrize("temperature", [0.5, 1.6])
def test_drafts_of_another_temperature(rule: str, temperature: float) -> None:
    """Sharper and flatter drafts; handing up the law that a text asks for in place of what was drawn from is caught."""
    tables = approximations(2, 3, 14)
    other = lm_drafter(tables[-1], 2)
    other.draft_temperature = temperature
    assert distance(chain(tables, (rule,), drafter=other), tables[0], 3) < EXACT

    class Claims(CausalLMDrafter):
        def propose(self, context: Context, limits: list[int], law: LawMaker) -> Proposal:
            drawn = super().propose(context, limits, law)
            if not drawn.width:
                return drawn
            places = [tuple(context.ids[0] + drawn.tokens[0][:i]) for i in range(drawn.width)]
            return Proposal(drawn.tokens, torch.stack([tables[-1].law(place) for place in places])[None], drawn.origins)

    wrong = Claims(tables[-1], name="drafter", draft_tokens=2, draft_temperature=temperature)
    assert distance(chain(tables, (rule,), drafter=wrong), tables[0], 3) > 0.01


def test_position_by_position_for_processors_with_state() -> None:
    tables = approximations(3, 3, 17)
    assert distance(chain(tables, ("auto", "auto")), tables[0], 3, sampling(Opaque())) < EXACT


@pytest.mark.parametrize("rule", ["token", "block"])
@pytest.mark.parametrize("law", [sampling(), sampling(Opaque())], ids=["at once", "in step"])
def test_rows_are_independent(rule: str, law: LawMaker) -> None:
    """Two rows in one batch: their joint law is the product of the target's laws."""
    tables = approximations(2, 2, 19)
    level = OneChoice(lm_drafter(tables[-1]))
    top = Verifier(tables[0], level, name="target", rule=rule)
    top.begin(0, 2, 2)
    # In step, rows have one length, as they have in plain generation; otherwise they may be ragged.
    starts, length = ((0,), (1,) if law.in_order else (1, 1)), 2

    def program(replay: object) -> tuple[tuple[tuple[int, ...], ...], None]:
        rows: list[tuple[int, ...]] = [(), ()]
        while any(len(row) < length for row in rows):
            longest = max(len(row) for row in rows) if law.in_order else 0
            filled = [row + (0,) * (longest - len(row)) for row in rows]
            context = context_of(*(start + row for start, row in zip(starts, filled, strict=True)))
            emission = top.round(
                context, [length - len(row) for row in rows], LawMaker(law.processors, True, CPU, replay)
            )
            rows = [row + tuple(more) for row, more in zip(rows, emission.tokens, strict=True)]
        return tuple(rows), None

    joint = outcomes(program)
    left, right = (true_law(tables[0], start, length) for start in starts)
    worst = max(abs(joint[(a, b)][0] - left[a] * right[b]) for a in left for b in right)
    assert worst < EXACT


def test_block_verification_never_accepts_fewer_tokens() -> None:
    """Mean tokens a target pass, exactly, on the same models (Sun et al. 2024, theorem 2)."""
    means = {}
    for rule in ("token", "block"):
        tables = approximations(2, 3, 23)
        top = chain(tables, (rule,), drafter=lm_drafter(tables[-1], 3))

        def program(replay: object, top: Verifier = top) -> tuple[int, None]:
            return len(top.round(context_of(START), [4], LawMaker([], True, CPU, replay)).tokens[0]), None

        means[rule] = sum(count * weight for count, (weight, _) in outcomes(program).items())
    assert means["block"] > means["token"] + 1e-3


# The mistakes. Each double changes one thing of the real level.


class LawOfTheDrafter(OneChoiceRounds):
    """Hands up accepted tokens with the drafter's law instead of its own."""

    drafter_table: TableModel

    def propose(self, context: Context, limits: list[int], law: LawMaker) -> Proposal:
        proposal = super().propose(context, limits, law)
        if proposal.q is None or not proposal.tokens[0]:
            return proposal
        rows = [
            self.drafter_table.law(tuple(context.ids[0] + proposal.tokens[0][:i]))
            if origin > self.index
            else proposal.q[0, i]
            for i, origin in enumerate(proposal.origins[0])
        ]
        return Proposal(proposal.tokens, torch.stack(rows)[None], proposal.origins)


class DropsItsOwnToken(OneChoiceRounds):
    """Hands up accepted tokens only, as the paper's Algorithm 1 is printed."""

    def propose(self, context: Context, limits: list[int], law: LawMaker) -> Proposal:
        emission = self.round(context, limits, law) if limits[0] else None
        if emission is None or not emission.accepted[0]:
            return Proposal([[]], None, [[]])
        kept = emission.accepted[0]
        assert emission.p is not None
        return Proposal([emission.tokens[0][:kept]], emission.p[:, :kept], [emission.origins[0][:kept]])


class DropsUnsureTokens(OneChoiceRounds):
    """Leaves out a last token that its law thought unlikely."""

    def propose(self, context: Context, limits: list[int], law: LawMaker) -> Proposal:
        proposal = super().propose(context, limits, law)
        row = proposal.tokens[0]
        if proposal.q is None or not row or proposal.q[0, len(row) - 1, row[-1]] > 0.4:
            return proposal
        return Proposal([row[:-1]], proposal.q[:, : len(row) - 1], [proposal.origins[0][:-1]])


class AllOrNothing(Verifier):
    """Takes a block whole, or draws one token from p."""

    def round(self, context: Context, limits: list[int], law: LawMaker) -> Emission:
        emission = super().round(context, limits, law)
        if emission.accepted[0] == emission.drafted[0]:
            return emission
        token = int(law.draw(law.probabilities(emission.scores[:, 0]))[0])
        return Emission(
            [[token]], None, [[0]], emission.drafted, [0], emission.logits, emission.scores, emission.passed
        )


@pytest.mark.parametrize("middle", [LawOfTheDrafter, DropsItsOwnToken, DropsUnsureTokens])
def test_wrong_middles_are_caught(middle: type[OneChoiceRounds]) -> None:
    tables = approximations(3, 3, 1)
    LawOfTheDrafter.drafter_table = tables[-1]
    assert distance(chain(tables, ("token", "token"), middle=middle), tables[0], 3) > 0.01


def test_all_or_nothing_is_caught() -> None:
    tables = approximations(3, 3, 1)
    assert distance(chain(tables, ("token", "token"), target=AllOrNothing), tables[0], 3) > 0.01


@pytest.mark.parametrize("count", [2, 3])
def test_recovering_from_p_is_caught(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def from_p(*args: object) -> Verdict:
        verdict = genuine(*args)
        p = args[2]
        return Verdict(verdict.accepted, p[torch.arange(p.shape[0]), verdict.accepted])

    genuine = judgement_module.verify_tokens
    monkeypatch.setattr(judgement_module, "verify_tokens", from_p)
    tables = approximations(count, 3, 1)
    assert distance(chain(tables, ("token",) * (count - 1)), tables[0], 3) > 0.01


def test_dropping_an_unsure_draft_token_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    class Dropping(CausalLMDrafter):
        def propose(self, context: Context, limits: list[int], law: LawMaker) -> Proposal:
            proposal = super().propose(context, limits, law)
            row = proposal.tokens[0]
            if proposal.q is None or proposal.q[0, len(row) - 1, row[-1]] > 0.4:
                return proposal
            return Proposal([row[:-1]], proposal.q[:, : len(row) - 1], [proposal.origins[0][:-1]])

    tables = approximations(2, 3, 1)
    top = chain(tables, ("token",), drafter=Dropping(tables[-1], name="drafter", draft_tokens=2))
    assert distance(top, tables[0], 3) > 0.01
