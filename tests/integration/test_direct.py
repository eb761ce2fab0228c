# SPDX-License-Identifier: Apache-2.0
"""`polyspec_direct_tokens`: drafts without a model pass a middle by, and the text stays the target's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny_models import head_for, noisy, prompts
from transformers import PreTrainedModel

from hf_polyspec import SuffixDrafter
from hf_polyspec.generation.doors import generate
from hf_polyspec.host.lending import WORTH
from hf_polyspec.levels.block import Block
from hf_polyspec.quantization import quantize_model

Tiny = Callable[..., PreTrainedModel]
NEW = 60
EAGER = {"min_probability": 0.0}


def answered(target: PreTrainedModel, given: dict[str, Any], chain: list[Any], **options: Any) -> Any:
    settings = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None, "return_dict_in_generate": True}
    if not chain:
        return target.generate(**given, **settings, **options)
    return generate(target, **given, assistant_models=chain, **settings, **options)


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("direct", [1, 4])
def test_greedy_text_is_the_targets_and_drafts_pass_by(tiny: Tiny, rows: int, direct: int) -> None:
    target = tiny("llama")
    middle, given = noisy(target, 0.01, 1), prompts(rows)
    plain = answered(target, given, [])
    found = answered(target, given, [middle, SuffixDrafter(**EAGER)], polyspec_direct_tokens=direct)
    assert torch.equal(found.sequences, plain.sequences)
    inner, suffix = found.polyspec.levels[1:]
    assert inner.drafted < suffix.drafted
    assert suffix.accepted > 0
    # The drafter hears of every draft once: what the middle kept, and what the target kept of those that passed by.
    of_suffix = sum(level == 2 for row in found.polyspec.token_levels for level in row)
    assert suffix.accepted >= of_suffix > 0


def test_the_middle_takes_the_keys_of_what_passed_it_by(tiny: Tiny) -> None:
    target = tiny("llama")
    middle, given = quantize_model(target, 8), prompts(1, WORTH + 8)
    fed: list[int] = []
    middle.register_forward_pre_hook(
        lambda module, args, kwargs: fed.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    options = {"polyspec_direct_tokens": 3, "polyspec_block_size": 3}
    found = answered(target, given, [middle, SuffixDrafter(**EAGER)], **options)
    assert torch.equal(found.sequences, answered(target, given, []).sequences)
    passed_by = found.polyspec.levels[2].drafted - found.polyspec.levels[1].drafted
    assert passed_by > 3
    # One token of its own, at most two drafted, and at most one it has not seen.
    assert max(fed) <= 4


def test_drafts_of_models_and_heads_are_always_checked(tiny: Tiny) -> None:
    target = tiny("llama")
    middle, given = noisy(target, 0.01, 1), prompts(1)
    for chain in ([middle], [middle, noisy(target, 0.05, 2)], [middle, head_for(middle)]):
        usual, asked = (answered(target, given, chain, polyspec_direct_tokens=n) for n in (0, 1))
        assert torch.equal(usual.sequences, asked.sequences)
        assert [level.rounds for level in usual.polyspec.levels] == [level.rounds for level in asked.polyspec.levels]


@pytest.mark.parametrize("control", ["fixed", "online"])
def test_an_online_control_has_every_draft_checked(tiny: Tiny, control: str, monkeypatch: pytest.MonkeyPatch) -> None:
    passed_by: list[int] = []
    close = Block.close
    monkeypatch.setattr(Block, "close", lambda block, row, *draft: (passed_by.append(row), close(block, row, *draft)))
    target = tiny("llama")
    middle, given = noisy(target, 0.01, 1), prompts(1)
    chain = [middle, SuffixDrafter(**EAGER)]
    found = answered(target, given, chain, polyspec_direct_tokens=1, polyspec_control=control)
    assert torch.equal(found.sequences, answered(target, given, []).sequences)
    assert bool(passed_by) is (control == "fixed")


@pytest.mark.parametrize(("given", "device", "sure"), [({}, "cpu", True), ({}, "cuda", False), (EAGER, "cuda", True)])
def test_drafts_are_sure_where_they_end_early_or_somebody_chose_their_end(
    given: dict[str, float], device: str, sure: bool
) -> None:
    assert SuffixDrafter(**given).long_is_sure(torch.device(device)) is sure


def test_sampled_text_ends_where_the_text_ends(tiny: Tiny) -> None:
    """An end-of-text id inside a draft that passed by ends the row, in a batch whose rows go different ways."""
    target = tiny("llama")
    middle, given = noisy(target, 0.01, 1), prompts(3)
    torch.manual_seed(3)
    found = generate(
        target,
        **given,
        assistant_models=[middle, SuffixDrafter(**EAGER)],
        polyspec_direct_tokens=2,
        do_sample=True,
        max_new_tokens=NEW,
        eos_token_id=[5, 6, 7, 8],
        pad_token_id=0,
    )
    for row in found[:, given["input_ids"].shape[1] :].tolist():
        ends = [i for i, token in enumerate(row) if token in (5, 6, 7, 8)]
        assert not ends or set(row[ends[0] + 1 :]) <= {0}
