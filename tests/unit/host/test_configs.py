# SPDX-License-Identifier: Apache-2.0
"""The target's own generation config for one plain call."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from transformers import GenerationConfig

from hf_polyspec.host.configs import generation_config


def test_a_sampled_call_keeps_the_targets_own_options_and_leaves_them_alone() -> None:
    own = GenerationConfig(max_length=9, top_p=0.9, top_k=7, temperature=0.3, eos_token_id=[5, 6])
    before = own.to_dict()
    made = generation_config(SimpleNamespace(generation_config=own), 12, 0.5)
    assert (made.max_length, made.max_new_tokens, made.return_dict_in_generate) == (None, 12, True)
    assert (made.do_sample, made.temperature, made.top_p, made.top_k) == (True, 0.5, 0.9, 7)
    assert own.to_dict() == before


def test_a_greedy_call_has_no_options_of_sampling() -> None:
    own = GenerationConfig(do_sample=True, top_p=0.9, top_k=7, min_p=0.1, temperature=0.3)
    made = generation_config(SimpleNamespace(generation_config=own), 12, 0)
    assert made.do_sample is False
    assert (made.temperature, made.top_p, made.top_k, made.min_p) == (None, None, None, None)


@pytest.mark.parametrize(
    ("own", "given", "padding"),
    [
        ({"eos_token_id": [5, 6]}, None, 5),
        ({"eos_token_id": 6}, None, 6),
        ({"eos_token_id": [5, 6]}, 0, 0),
        ({"eos_token_id": 6, "pad_token_id": 2}, 0, 2),
        ({}, None, None),
    ],
)
def test_what_fills_up_rows(own: dict[str, object], given: int | None, padding: int | None) -> None:
    target = SimpleNamespace(generation_config=GenerationConfig(**own))
    assert generation_config(target, 12, 0, given).pad_token_id == padding
