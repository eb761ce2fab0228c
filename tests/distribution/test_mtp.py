# SPDX-License-Identifier: Apache-2.0
"""Multi-token-prediction layers, sampled: thousands of draws against the exact distribution.

Seeds are fixed. A correct chain fails a case here with probability 1e-4 (chi-square), the file with 2e-4.
Every outcome under both rules is in `test_enumeration_shown`.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from exact_laws import drawn, exact_law, p_value
from mtp_models import with_mtp
from tiny_models import noisy

from hf_polyspec.host.mtp import MtpLayers
from hf_polyspec.levels.mtp import MtpDrafter

VOCABULARY, LENGTH, DRAWS, FALSE_ALARM = 8, 4, 2000, 1e-4
PROMPT = torch.tensor([[3, 7, 1, 7]])


def chance_of(model: Any, found: Any) -> float:
    law = exact_law(model, PROMPT, LENGTH, VOCABULARY, lambda _, logits: logits)
    return p_value(found.sequences, PROMPT, law)


class ArgmaxWithLaws(MtpDrafter):
    """The published mistake: what is likeliest is proposed, with a law as if it had been drawn."""

    def draw(self, context: Any, tokens: Any, logits: Any, drawing: Any, going: Any, law: Any) -> torch.Tensor:
        kept = [list(row) for row in tokens]
        q = super().draw(context, kept, logits, drawing, going, law)
        for b, row in enumerate(tokens):
            if len(kept[b]) > len(row):
                row.append(int(q[b].argmax()))
        return q


def draw(rule: str, middle: bool, kind: type[MtpDrafter] = MtpDrafter) -> tuple[Any, Any]:
    model, layers = with_mtp("deepseek_v3", 2, vocab_size=VOCABULARY, num_hidden_layers=1)
    drafter = kind(MtpLayers(layers))
    levels = [noisy(model, 0.3, seed=2), drafter] if middle else [drafter]
    found = drawn(model, levels, PROMPT, rule, LENGTH, DRAWS, polyspec_block_size=2)
    return model, found


@pytest.mark.parametrize(("rule", "middle"), [("block", False), ("token", True)], ids=["drafter", "under a middle"])
def test_the_law_is_the_targets(rule: str, middle: bool) -> None:
    model, found = draw(rule, middle)
    assert found.polyspec.levels[-1].drafted > DRAWS
    assert found.polyspec.levels[-2].accepted > DRAWS / 20
    assert chance_of(model, found) > FALSE_ALARM


def test_the_test_sees_a_law_that_nothing_was_drawn_from() -> None:
    model, found = draw("token", False, ArgmaxWithLaws)
    assert chance_of(model, found) < FALSE_ALARM
