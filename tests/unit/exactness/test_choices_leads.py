# SPDX-License-Identifier: Apache-2.0
"""How far a choice is ahead of the second, and that looking changes no choice."""

from __future__ import annotations

import math

import pytest
import torch

from hf_polyspec.exactness.context import Context, Prompt
from hf_polyspec.exactness.distributions import LawMaker
from hf_polyspec.exactness.judgement import judge
from hf_polyspec.exactness.noise import SharedNoise
from hf_polyspec.exactness.proposal import Proposal

CPU = torch.device("cpu")
CONTEXT = Context([[1]], Prompt(1, None, torch.zeros(1, 1, dtype=torch.long)))
GREEDY = LawMaker([], False, CPU)


def racing(width: int) -> LawMaker:
    return LawMaker([], True, CPU, noise=SharedNoise([torch.Generator().manual_seed(4)], 1, width))


def leads_of(law: LawMaker, scores: torch.Tensor) -> list[float]:
    """Leads at successive positions; choices are compared with those of `choose`."""
    ahead = [list(range(scores.shape[1]))]
    chosen, leads = law.choose_with_lead(scores, CONTEXT, ahead)
    alone, none = law.choose_with_lead(scores, CONTEXT, ahead, leads=False)
    assert none is None
    assert leads is not None
    assert torch.equal(chosen, law.choose(scores, CONTEXT, ahead))
    assert torch.equal(chosen, alone)
    assert chosen.shape == leads.shape == scores.shape[:2]
    return leads[0].tolist()  # type: ignore[no-any-return]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_of_the_likeliest(dtype: torch.dtype) -> None:
    rows = [[0.0, 2.0, -1.0, 1.5], [3.0, 3.0, 1.0, 3.0], [-4.0, -8.0, -6.0, -5.0]]
    scores = torch.tensor([rows], dtype=dtype)
    assert leads_of(GREEDY, scores) == [0.5, 0.0, 1.0]
    assert GREEDY.choose(scores[:, 1:2], CONTEXT, [[0]]).tolist() == [[0]], "of equal ones the first"


def test_of_the_winner_of_a_race() -> None:
    """In logits: a score and its Gumbel noise, minus the logarithm of exponential noise."""
    scores = torch.randn(1, 40, 12, generator=torch.Generator().manual_seed(0)) * 3
    noise = torch.empty(40, 1, 12)
    generator = torch.Generator().manual_seed(4)
    for step in noise:
        step.exponential_(1, generator=generator)
    perturbed = scores[0] - noise[:, 0].log()
    first, second = perturbed.topk(2, -1).values.unbind(-1)
    assert leads_of(racing(12), scores) == pytest.approx((first - second).tolist(), abs=1e-4)
    assert torch.equal(racing(12).choose(scores, CONTEXT, [list(range(40))])[0], perturbed.argmax(-1))


@pytest.mark.parametrize("sampled", [False, True])
def test_what_leaves_one_id_only_is_sure(sampled: bool) -> None:
    scores = torch.full((1, 1, 6), -math.inf)
    scores[..., 3] = 1.0
    law = racing(6) if sampled else GREEDY
    assert leads_of(law, scores)[0] > 1e6
    assert law.choose(scores, CONTEXT, [[0]]).tolist() == [[3]]


@pytest.mark.parametrize("sampled", [False, True])
def test_what_is_no_law_has_no_lead(sampled: bool) -> None:
    law = racing(6) if sampled else GREEDY
    for value in (math.nan, -math.inf):
        found = leads_of(law, torch.full((1, 1, 6), value))
        assert found == [0.0]
    assert racing(6).choose(torch.full((1, 1, 6), math.nan), CONTEXT, [[0]]).tolist() == [[-1]]
    mixed = torch.zeros(1, 1, 6)
    mixed[..., 2] = math.nan
    assert leads_of(law, mixed) == [0.0]


@pytest.mark.parametrize("sampled", [False, True])
def test_a_vocabulary_of_one(sampled: bool) -> None:
    assert leads_of(racing(1) if sampled else GREEDY, torch.zeros(1, 2, 1)) == [0.0, 0.0]


def test_what_is_emitted_has_its_leads_and_nothing_else() -> None:
    """The second proposed id is not the likeliest: what stands behind it has none, and is told only if asked for."""
    logits = torch.tensor([[[0.0, 2.0, 1.0], [4.0, 1.0, 0.0], [0.0, 0.0, 9.0]]])
    offered = Proposal([[1, 2]], None, [[0, 0]])
    found = judge(GREEDY, CONTEXT, offered, logits, [True], "auto", 0, leads=True)
    assert (found.tokens, found.leads) == ([[1, 0]], [[1.0, 3.0]])
    assert judge(GREEDY, CONTEXT, offered, logits, [True], "auto", 0).leads == []
    drawn = judge(LawMaker([], True, CPU), CONTEXT, offered, logits, [True], "auto", 0, leads=True)
    assert drawn.leads == [], "what is drawn tells nothing by its lead"
