# SPDX-License-Identifier: Apache-2.0
"""Modules and what they hold are found as torch finds them; a plan of a cache is made anew when it may differ."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn
from transformers import PreTrainedModel

from hf_polyspec.host.states import layer_plan
from hf_polyspec.host.walking import modules_of, named_parameters_of, parameters_in


def odd() -> nn.Module:
    """A module that stands in two places, a place that is empty, a weight that two share."""
    shared = nn.Linear(2, 2)
    model = nn.Sequential(nn.Sequential(nn.Linear(2, 3), shared), shared, nn.Sequential(shared, nn.LayerNorm(2)))
    model.register_module("nobody", None)
    tied = nn.Linear(2, 3, bias=False)
    tied.weight = model[0][0].weight
    model.append(tied)
    return model


def test_as_torch_walks(tiny: Callable[..., PreTrainedModel]) -> None:
    for model in (odd(), tiny("llama"), nn.Linear(1, 1)):
        assert modules_of(model) == list(model.modules())
        named = named_parameters_of(model)
        once = {id(parameter): name for name, parameter in reversed(named)}
        assert [once[id(one)] for one in model.parameters()] == [name for name, _ in model.named_parameters()]
        assert {id(one) for one in parameters_in(modules_of(model))} == {id(one) for one in model.parameters()}


def test_a_config_that_says_something_else_is_asked_again(tiny: Callable[..., PreTrainedModel]) -> None:
    model = tiny("qwen3", layer_types=["full_attention", "full_attention"])
    before = layer_plan(model)
    assert layer_plan(model) is before, "made once"
    model.config.layer_types[1] = "sliding_attention"
    model.config.sliding_window = 8
    kinds = [type(layer).__name__ for layer in layer_plan(model)]
    assert kinds[0] != kinds[1]
