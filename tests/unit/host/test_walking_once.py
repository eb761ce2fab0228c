# SPDX-License-Identifier: Apache-2.0
"""Modules of a model are walked through once while levels are made, and each time again afterwards."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

import hf_polyspec
from hf_polyspec.generation.loop import DecodingLoop
from hf_polyspec.host import walking
from hf_polyspec.host.walking import Once, also_once, modules_of


def two() -> nn.Sequential:
    return nn.Sequential(nn.Linear(2, 2), nn.ReLU())


def test_within_it_stays_and_behind_it_is_looked_at_again() -> None:
    model, other = two(), two()
    with Once(model) as once:
        before = modules_of(model)
        model.append(nn.Tanh())
        assert modules_of(model) is before
        assert modules_of(other) == list(other.modules())
        other.append(nn.Tanh())
        assert len(modules_of(other)) == 4, "nobody promised that it stays"
        once.end()
        assert len(modules_of(model)) == 4
    assert len(modules_of(model)) == 4


def test_a_copy_that_was_made_meanwhile() -> None:
    model, copy = two(), two()
    also_once(copy, {})
    copy.append(nn.Tanh())
    assert len(modules_of(copy)) == 4, "nobody walks once"
    with Once(model) as once:
        also_once(copy, {})
        before = modules_of(copy)
        assert modules_of(copy) is before
        once.end()
        also_once(copy, {})
        assert modules_of(copy) is not before, "it has ended"


def test_calls_inside_each_other_and_other_threads() -> None:
    model, found = two(), []
    with Once(model):
        before = modules_of(model)
        with Once(model):
            assert modules_of(model) is not before
        assert modules_of(model) is before
        thread = threading.Thread(target=lambda: found.append(modules_of(model)))
        thread.start()
        thread.join()
        with pytest.raises(KeyError), Once(two()):
            raise KeyError
        assert modules_of(model) is before
    assert found[0] is not before
    assert found[0] == before


@pytest.mark.parametrize("assistants", ["auto", []])
def test_a_call_walks_once_through_each_model(
    tiny: Callable[..., PreTrainedModel], assistants: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, walks = tiny("llama"), []
    ids = torch.arange(3, 12)[None]
    given: dict[str, Any] = {"assistant_models": assistants, "max_new_tokens": 4, "do_sample": False}
    for _ in range(2):
        hf_polyspec.generate(model, ids, **given)
    walked, run = walking._walked, DecodingLoop.run
    before: list[Any] = []
    monkeypatch.setattr(walking, "_walked", lambda one: (walks.append(one), walked(one))[1])
    monkeypatch.setattr(DecodingLoop, "run", lambda *all_: (before.extend(walks), run(*all_))[1])
    hf_polyspec.generate(model, ids, **given)
    whole = [one for one in before if isinstance(one, PreTrainedModel)]
    assert len(whole) == len(set(map(id, whole)))
    assert model in whole


def test_a_module_put_in_between_two_calls_is_met(tiny: Callable[..., PreTrainedModel]) -> None:
    """What a call has walked through says nothing of the next one."""
    import copy

    model = copy.deepcopy(tiny("llama"))
    ids = torch.arange(3, 12)[None]
    given: dict[str, Any] = {"assistant_models": "auto", "max_new_tokens": 6, "do_sample": False}
    for _ in range(2):
        hf_polyspec.generate(model, ids, **given)
    for scale in (3.0, -2.0):
        head = nn.Linear(model.lm_head.in_features, model.lm_head.out_features, bias=False)
        head.weight = nn.Parameter(model.lm_head.weight.detach().roll(7, 0) * scale, requires_grad=False)
        model.set_output_embeddings(head.eval())
        wanted = model.generate(ids, max_new_tokens=6, do_sample=False)
        assert hf_polyspec.generate(model, ids, **given).tolist() == wanted.tolist()
