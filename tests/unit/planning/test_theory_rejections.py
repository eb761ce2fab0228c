# SPDX-License-Identifier: Apache-2.0
"""Rejections, the bias dial and multi-draft, by enumeration, simulation and property."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hf_polyspec.planning import theory

# The same examples in every run, however busy the machine is.
REPEATABLE = settings(deadline=None, derandomize=True, max_examples=60)

BUDGETS = st.floats(0.0, 1.0)


@st.composite
def pairs_of_laws(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    """Two laws over the same 2 to 6 symbols, zeros included."""
    size = draw(st.integers(2, 6))
    laws = []
    for _ in range(2):
        weights = draw(st.lists(st.integers(0, 50), min_size=size, max_size=size).filter(any))
        laws.append(torch.tensor(weights, dtype=torch.float64))
    return laws[0] / laws[0].sum(), laws[1] / laws[1].sum()


def random_rows(rows: int, size: int, seed: int) -> Tensor:
    source = torch.Generator().manual_seed(seed)
    return torch.softmax(1.5 * torch.randn(rows, size, generator=source, dtype=torch.float64), -1)


@REPEATABLE
@given(pairs_of_laws())
def test_agreement_is_one_minus_total_variation(laws: tuple[Tensor, Tensor]) -> None:
    p, q = laws
    distance = float(theory.total_variation(p, q))
    assert float(theory.agreement(p, q)) == pytest.approx(1 - distance, abs=1e-12)
    exact = theory.acceptance_probability(p, q)
    assert float(theory.rejection_probability(q, exact)) == pytest.approx(distance, abs=1e-12)
    assert torch.allclose(theory.emitted_law(p, q, exact), p, atol=1e-12)


@REPEATABLE
@given(pairs_of_laws(), BUDGETS)
def test_dial_moves_along_the_line(laws: tuple[Tensor, Tensor], budget: float) -> None:
    p, q = laws
    distance = float(theory.total_variation(p, q))
    (point,) = theory.pareto_front(p, q, [budget])
    assert point.rejection == pytest.approx((1 - budget) * distance, abs=1e-12)
    assert point.bias == pytest.approx(budget * distance, abs=1e-12)

    accept = theory.acceptance_probability(p, q, budget)
    assert float(theory.smallest_bias(p, q, accept)) == pytest.approx(point.bias, abs=1e-12)
    law = theory.emitted_law(p, q, accept)
    assert float(law.sum()) == pytest.approx(1.0, abs=1e-12)
    assert torch.allclose(law, p + budget * (q - p), atol=1e-12), "a mixture of both laws"
    exact = theory.acceptance_probability(p, q)
    assert torch.allclose(theory.rejection_law(p, q, accept), theory.rejection_law(p, q, exact), atol=1e-9) or (
        point.rejection < 1e-9
    )


@REPEATABLE
@given(pairs_of_laws(), st.lists(BUDGETS, min_size=6, max_size=6), st.lists(st.integers(1, 50), min_size=6))
def test_every_over_accepting_rule_lies_on_the_line_and_no_rejection_law_does_better(
    laws: tuple[Tensor, Tensor], spread: list[float], weights: list[int]
) -> None:
    p, q = laws
    exact = theory.acceptance_probability(p, q)
    accept = exact + torch.tensor(spread[: len(p)], dtype=p.dtype) * (1 - exact)
    rejected = theory.rejection_probability(q, accept)
    best = theory.smallest_bias(p, q, accept)
    assert float(rejected + best) == pytest.approx(float(theory.total_variation(p, q)), abs=1e-12)
    reached = theory.total_variation(theory.emitted_law(p, q, accept), p)
    assert float(reached) == pytest.approx(float(best), abs=1e-12)

    other = torch.tensor(weights[: len(p)], dtype=p.dtype)
    for law in (other / other.sum(), p):
        emitted = accept * q + rejected * law
        assert float((emitted - p).abs().sum() / 2) >= float(best) - 1e-12


@REPEATABLE
@given(pairs_of_laws(), st.lists(BUDGETS, min_size=6, max_size=6))
def test_timid_rules_stay_exact_and_reject_more(laws: tuple[Tensor, Tensor], spread: list[float]) -> None:
    p, q = laws
    accept = theory.acceptance_probability(p, q) * torch.tensor(spread[: len(p)], dtype=p.dtype)
    assert torch.allclose(theory.emitted_law(p, q, accept), p, atol=1e-12)
    assert float(theory.rejection_probability(q, accept)) >= float(theory.total_variation(p, q)) - 1e-12


def test_recovering_from_p_itself_is_biased_even_without_leniency() -> None:
    p, q = random_rows(2, 5, 0)
    accept = theory.acceptance_probability(p, q)
    naive = accept * q + theory.rejection_probability(q, accept) * p
    assert float(theory.total_variation(naive, p)) > 0.05
    assert float(theory.total_variation(theory.emitted_law(p, q, accept), p)) < 1e-12


class MarkovPair:
    """Two Markov chains over three symbols; texts start after symbol 0."""

    length = 20

    def __init__(self) -> None:
        # [previous symbol, symbol]
        self.target, self.drafter = random_rows(3, 3, 1), random_rows(3, 3, 2)

    def texts(self, rows: Tensor, count: int, seed: int) -> Tensor:
        """Symbols before each position, [count, length], of texts drawn from one of the chains."""
        source = torch.Generator().manual_seed(seed)
        state, states = torch.zeros(count, dtype=torch.long), []
        for _ in range(self.length):
            states.append(state)
            state = torch.multinomial(rows[state], 1, generator=source).squeeze(-1)
        return torch.stack(states, -1)

    def expected(self, rows: Tensor) -> float:
        """Sum over positions of the exact mean of TV, prefixes drawn from ``rows``."""
        distance = theory.total_variation(self.target, self.drafter)
        now, total = torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64), 0.0
        for _ in range(self.length):
            total += float(now @ distance)
            now = now @ rows
        return total


def test_simulated_rejections_are_the_sum_of_total_variation_along_the_targets_texts() -> None:
    # Seed 3, 10000 texts, two-sided at 5 standard errors: false alarm below 6e-7.
    pair, count = MarkovPair(), 10_000
    source = torch.Generator().manual_seed(3)
    accept = theory.acceptance_probability(pair.target, pair.drafter)
    recovered = theory.rejection_law(pair.target, pair.drafter, accept)
    state, rejections = torch.zeros(count, dtype=torch.long), torch.zeros(count, dtype=torch.float64)
    for _ in range(pair.length):
        token = torch.multinomial(pair.drafter[state], 1, generator=source).squeeze(-1)
        refused = torch.rand(count, generator=source, dtype=torch.float64) >= accept[state, token]
        other = torch.multinomial(recovered[state], 1, generator=source).squeeze(-1)
        state = torch.where(refused, other, token)
        rejections += refused
    mean, error = float(rejections.mean()), float(rejections.std()) / math.sqrt(count)

    assert abs(mean - pair.expected(pair.target)) < 5 * error
    assert abs(mean - pair.expected(pair.drafter)) > 5 * error, "prefixes of the drafter are the wrong ones"


def test_expected_rejections_of_sampled_texts() -> None:
    # Seed 4, 10000 texts, two-sided at 5 standard errors: false alarm below 6e-7.
    pair, count = MarkovPair(), 10_000
    states = pair.texts(pair.target, count, 4)
    # [count, length, 3] -> [count]
    each = theory.expected_rejections(pair.target[states], pair.drafter[states])
    assert each.shape == (count,)
    error = float(each.std()) / math.sqrt(count)
    assert abs(float(each.mean()) - pair.expected(pair.target)) < 5 * error
    assert abs(float(each.mean()) - pair.expected(pair.drafter)) > 5 * error


def decisions(p: Tensor, drawn_from: Tensor, accept: Tensor, count: int) -> Tensor:
    source = torch.Generator().manual_seed(5)
    token = torch.multinomial(drawn_from, count, replacement=True, generator=source)
    return torch.rand(count, generator=source, dtype=torch.float64) >= accept[token]


def test_rejection_z_score_tells_right_from_wrong() -> None:
    # Seed 5, 20000 decisions; |z| < 5: false alarm below 6e-7.
    p, q = random_rows(2, 6, 6)
    count = 20_000
    laws = p.expand(count, -1), q.expand(count, -1)
    exact = theory.acceptance_probability(p, q)
    assert abs(theory.rejection_z_score(decisions(p, q, exact, count), *laws)) < 5
    lossy = theory.acceptance_probability(p, q, 0.2)
    assert theory.rejection_z_score(decisions(p, q, lossy, count), *laws) < -5
    shifted = exact.roll(1)
    assert theory.rejection_z_score(decisions(p, q, shifted, count), *laws) > 5


def test_rejection_z_score_without_randomness() -> None:
    same = torch.tensor([[0.0, 1.0]])
    assert theory.rejection_z_score(torch.tensor([False]), same, same) == 0.0
    assert theory.rejection_z_score(torch.tensor([True]), same, same) == math.inf
    with pytest.raises(ValueError, match="shape"):
        theory.rejection_z_score(torch.tensor([True, False]), same, same)


def test_bias_of_a_text_is_at_most_what_has_accumulated() -> None:
    target, drafter, length = random_rows(3, 3, 7), random_rows(3, 3, 8), 4
    for budget in (0.0, 0.1, 0.5, 1.0):
        lossy = theory.emitted_law(target, drafter, theory.acceptance_probability(target, drafter, budget))
        apart = accumulated = 0.0
        for text in itertools.product(range(3), repeat=length):
            before = [0, *text[:-1]]
            true = math.prod(float(target[s, x]) for s, x in zip(before, text, strict=True))
            said = math.prod(float(lossy[s, x]) for s, x in zip(before, text, strict=True))
            apart += abs(true - said) / 2
            accumulated += said * float(theory.accumulated_bias(target[before], drafter[before], budget))
        assert apart <= accumulated + 1e-12
        assert (apart > 0.01) == (budget > 0)


def test_multi_draft_rejections_equal_enumeration() -> None:
    p, q = random_rows(2, 3, 9)
    for drafts in (1, 2, 3):
        refused, emitted = 0.0, torch.zeros(3, dtype=torch.float64)
        for tokens in itertools.product(range(3), repeat=drafts):
            weight, left = math.prod(float(q[x]) for x in tokens), p
            for token in tokens:
                accept = theory.acceptance_probability(left, q)
                emitted[token] += weight * accept[token]
                weight *= 1 - float(accept[token])
                left = theory.rejection_law(left, q, accept)
            refused += weight
            emitted += weight * left
        assert float(theory.multi_draft_rejections(p, q, drafts)[-1]) == pytest.approx(refused, abs=1e-12)
        assert torch.allclose(emitted, p, atol=1e-12), "and the text stays exact"


@REPEATABLE
@given(pairs_of_laws())
def test_more_drafts_never_hurt(laws: tuple[Tensor, Tensor]) -> None:
    p, q = laws
    values = theory.multi_draft_rejections(p, q, 6)
    assert float(values[0]) == pytest.approx(float(theory.total_variation(p, q)), abs=1e-12)
    assert bool((values.diff() <= 1e-12).all())
    unreachable = float(p[q == 0].sum())
    assert float(values[-1]) >= unreachable - 1e-9


def test_batches_and_half_precision() -> None:
    p, q = random_rows(12, 5, 10).view(3, 4, 5), random_rows(12, 5, 11).view(3, 4, 5)
    assert theory.agreement(p, q).shape == (3, 4)
    assert theory.expected_rejections(p, q).shape == (3,)
    assert theory.multi_draft_rejections(p, q, 2).shape == (3, 4, 2)
    half = theory.agreement(p.bfloat16(), q.bfloat16())
    assert half.dtype == torch.float32
    assert torch.allclose(half.double(), theory.agreement(p, q), atol=0.01)


def test_one_hot_proposals() -> None:
    p = torch.tensor([0.7, 0.2, 0.1], dtype=torch.float64)
    q = torch.tensor([0.0, 1.0, 0.0], dtype=torch.float64)
    accept = theory.acceptance_probability(p, q)
    assert float(accept[1]) == pytest.approx(0.2)
    expected = torch.tensor([0.875, 0.0, 0.125], dtype=torch.float64)
    assert torch.allclose(theory.rejection_law(p, q, accept), expected)


LAW = torch.tensor([0.5, 0.5])


@pytest.mark.parametrize(
    "call",
    [
        lambda: theory.agreement(LAW, torch.tensor([1.0])),
        lambda: theory.total_variation(LAW, torch.tensor([0.5, 0.6])),
        lambda: theory.total_variation(LAW, torch.tensor([1.5, -0.5])),
        lambda: theory.total_variation(LAW, torch.tensor([float("nan"), 1.0])),
        lambda: theory.total_variation(LAW, torch.tensor([0, 1])),
        lambda: theory.acceptance_probability(LAW, LAW, 1.2),
        lambda: theory.accumulated_bias(LAW[None], LAW[None], -0.1),
        lambda: theory.rejection_probability(LAW, torch.tensor([2.0, 0.0])),
        lambda: theory.emitted_law(LAW, LAW, torch.tensor([1.0])),
        lambda: theory.pareto_front(LAW[None], LAW[None], [0.0]),
        lambda: theory.multi_draft_rejections(LAW, LAW, 0),
    ],
)
def test_tensors_that_are_no_laws_are_refused(call: object) -> None:
    assert callable(call)
    with pytest.raises(ValueError, match="must"):
        call()
