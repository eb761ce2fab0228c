# SPDX-License-Identifier: Apache-2.0
"""Many rows of one call share out their columns where nobody ordered otherwise; the text is plain generation's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_models import noisy, prompts, tiny

import hf_polyspec
from hf_polyspec.control import Shares
from hf_polyspec.control.shares import MANY
from hf_polyspec.generation import decoding


@pytest.fixture
def shared(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What `shares_of` was asked for and gave."""
    found: list[Any] = []
    real = decoding.shares_of

    def noted(*given: Any) -> Any:
        found.append(real(*given))
        return found[-1]

    monkeypatch.setattr(decoding, "shares_of", noted)
    return found


@pytest.mark.parametrize("sampled", [False, True])
@pytest.mark.parametrize("chain", ["suffix", "middle over suffix", "drafter"])
def test_many_rows_share_and_write_plain_generations_text(shared: list[Any], chain: str, sampled: bool) -> None:
    target = tiny("llama")
    near = noisy(target, 0.03)
    suffix = hf_polyspec.SuffixDrafter()
    assistants = {"suffix": [suffix], "middle over suffix": [near, suffix], "drafter": [near]}[chain]
    common = {**prompts(MANY, 11), "max_new_tokens": 14, "do_sample": sampled}
    torch.manual_seed(3)
    plain = target.generate(**common)
    torch.manual_seed(3)
    text = hf_polyspec.generate(target, assistant_models=assistants, num_assistant_tokens=3, **common)
    assert torch.equal(text, plain)
    assert [type(one) for one in shared] == [Shares]


@pytest.mark.parametrize(
    ("rows", "options"),
    [
        (MANY - 1, {}),
        (MANY, {"polyspec_control": "fixed"}),
        (MANY, {"do_sample": True, "polyspec_verification": "token"}),
        (MANY, {"do_sample": True, "polyspec_bias_budget": 0.1}),
        (MANY, {"assistant_models": []}),
    ],
)
def test_what_was_ordered_is_drafted(shared: list[Any], rows: int, options: dict[str, Any]) -> None:
    target = tiny("llama")
    asked = {"assistant_models": [noisy(target, 0.03)], "do_sample": False, **options}
    hf_polyspec.generate(target, **prompts(rows, 7), max_new_tokens=3, **asked)
    assert not any(shared)
