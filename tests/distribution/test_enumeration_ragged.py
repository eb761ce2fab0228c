# SPDX-License-Identifier: Apache-2.0
"""Rows of different lengths, each with its own columns, one of which ends first: every outcome of every coin.

Real models in float64 with two ids, so that the caches are the library's own; the joint law of what the rows emit is
the product of the target's laws, each row alone.
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from enumeration import CPU, EXACT, Replay, outcomes, total_variation
from tiny_models import noisy, tiny

from hf_polyspec.exactness.context import Context, Prompt
from hf_polyspec.exactness.distributions import LawMaker
from hf_polyspec.host.ragged import RaggedRunner
from hf_polyspec.host.ragged_cache import Regions
from hf_polyspec.levels.causal_lm import CausalLMDrafter
from hf_polyspec.levels.verifier import Verifier

ROWS = ([0, 1, 1, 0, 1], [1, 0])
LENGTHS = (3, 1)
"""Tokens of each row: while the first goes on, the second has ended."""


def model(noise: float) -> Any:
    made = tiny("llama", vocab_size=2, hidden_size=16, num_hidden_layers=1, initializer_range=0.5, pad_token_id=None)
    return noisy(made, noise).double()


def runner(of: Any) -> RaggedRunner:
    return RaggedRunner(of, "a level", rows=len(ROWS))


def chain(target: Any, draft: Any, middle: Any, rule: str) -> Verifier:
    level: Any = CausalLMDrafter(runner(draft), name="drafter", draft_tokens=2)
    if middle is not None:
        level = Verifier(runner(middle), level, name="middle", block_size=2, rule=rule)
    top = Verifier(runner(target), level, name="target", rule=rule)
    top.begin(0, len(ROWS), 2)
    return top


def joint_law(top: Verifier) -> dict[Any, float]:
    prompt = Prompt.apart([len(row) for row in ROWS], [0, 1])

    def program(replay: Replay) -> tuple[Any, None]:
        context, law = Context([list(row) for row in ROWS], prompt), LawMaker([], True, CPU, replay)
        while any(limits := [n - len(i) + len(r) for n, i, r in zip(LENGTHS, context.ids, ROWS, strict=True)]):
            context = context.extended(top.round(context, limits, law).tokens)
        return tuple(tuple(ids[len(row) :]) for ids, row in zip(context.ids, ROWS, strict=True)), None

    return {key: weight for key, (weight, _) in outcomes(program).items()}


def true_law(target: Any) -> dict[Any, float]:
    law: dict[Any, float] = {}
    for tokens in itertools.product(*(itertools.product((0, 1), repeat=n) for n in LENGTHS)):
        weight = 1.0
        for row, new in zip(ROWS, tokens, strict=True):
            laws = target(torch.tensor([[*row, *new]])).logits[0].softmax(-1)
            weight *= float(torch.stack([laws[len(row) - 1 + i, t] for i, t in enumerate(new)]).prod())
        law[tokens] = weight
    return law


@torch.no_grad()
@pytest.mark.parametrize(("levels", "rule"), [(2, "token"), (3, "block")])
def test_the_joint_law_is_the_targets(levels: int, rule: str) -> None:
    target = model(0.0)
    found = joint_law(chain(target, model(0.5), model(0.2) if levels == 3 else None, rule))
    assert sum(found.values()) == pytest.approx(1, abs=1e-12)
    assert total_variation(found, true_law(target)) < EXACT


@torch.no_grad()
def test_rows_that_share_a_region_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The wrong variant: both rows write to one place of the cache."""
    settle = Regions._settle

    def settled(self: Regions, row: int, room: int) -> None:
        settle(self, row, room)
        self.bases[row] = 0

    monkeypatch.setattr(Regions, "_settle", settled)
    target = model(0.0)
    found = joint_law(chain(target, model(0.5), None, "token"))
    assert total_variation(found, true_law(target)) > 1e-3
