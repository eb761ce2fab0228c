# SPDX-License-Identifier: Apache-2.0
"""DFlash drafters and Gemma 4's assistants, sampled: hundreds of draws against the exact distribution.

Seeds are fixed. A correct chain fails a case here with probability 1e-4 (chi-square), the file with 4e-4.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from companion_models import dflash, gemma, keyless
from exact_laws import drawn, exact_law, p_value
from tiny_models import noisy, tiny

from hf_polyspec.levels.keyless import KeylessDrafter
from hf_polyspec.levels.sequential import SequentialDrafter

VOCABULARY, LENGTH, DRAWS, FALSE_ALARM = 4, 4, 1000, 1e-4
PROMPT = torch.tensor([[3, 1, 2, 3, 1, 1, 2]])


def _models(kind: str) -> tuple[Any, Any]:
    if kind == "dflash":
        return tiny("llama", vocab_size=VOCABULARY), dflash(VOCABULARY)
    return gemma(VOCABULARY), keyless(VOCABULARY)


def _chance(kind: str, rule: str, middle: bool) -> float:
    """Of counts as far from the target's law, if they follow it."""
    model, drafter = _models(kind)
    levels = [noisy(model, 0.3, seed=2), drafter] if middle else [drafter]
    found = drawn(model, levels, PROMPT, rule, LENGTH, DRAWS)
    assert found.polyspec.levels[-1].drafted > DRAWS
    assert found.polyspec.levels[-2].accepted > DRAWS / 20
    law = exact_law(model, PROMPT, LENGTH, VOCABULARY, lambda _, logits: logits)
    return p_value(found.sequences, PROMPT, law)


@pytest.mark.parametrize("kind", ["dflash", "keyless"])
@pytest.mark.parametrize(("rule", "middle"), [("block", False), ("token", True)], ids=["drafter", "under a middle"])
def test_the_law_is_the_targets(kind: str, rule: str, middle: bool) -> None:
    assert _chance(kind, rule, middle) > FALSE_ALARM


def test_the_test_sees_what_transformers_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """The assistant's likeliest token with its law, as if it had been drawn."""

    def likeliest(self: Any, context: Any, tokens: Any, logits: Any, drawing: Any, going: Any, law: Any) -> Any:
        kept = [list(row) for row in tokens]
        q = SequentialDrafter.draw(self, context, kept, logits, drawing, going, law)
        for b, row in enumerate(tokens):
            if len(kept[b]) > len(row):
                row.append(int(q[b].argmax()))
        return q

    monkeypatch.setattr(KeylessDrafter, "draw", likeliest)
    assert _chance("keyless", "token", False) < FALSE_ALARM
