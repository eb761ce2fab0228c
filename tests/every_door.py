# SPDX-License-Identifier: Apache-2.0
"""Every way of getting `assistant_models` into generate(), as functions of a model and a call."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaForCausalLM, PreTrainedModel

import hf_polyspec

RECIPE = Path(__file__).parents[1] / "recipes" / "custom_generate"


class WithMixin(hf_polyspec.PolySpecGenerationMixin, LlamaForCausalLM):
    """A model class of a user's own."""


def enabled(model: PreTrainedModel, **options: Any) -> Any:
    hf_polyspec.enable()
    return model.generate(**options)


def attached(model: PreTrainedModel, **options: Any) -> Any:
    assert hf_polyspec.attach(model) is model
    return model.generate(**options)


def mixed_in(model: PreTrainedModel, **options: Any) -> Any:
    with torch.random.fork_rng():
        other = WithMixin(model.config).eval()
    other.load_state_dict(model.state_dict())
    other.generation_config = model.generation_config
    return other.generate(**options)


def callable_given(model: PreTrainedModel, **options: Any) -> Any:
    return model.generate(**options, custom_generate=hf_polyspec.decode)


def recipe(model: PreTrainedModel, **options: Any) -> Any:
    return model.generate(**options, custom_generate=str(RECIPE), trust_remote_code=True)


def function(model: PreTrainedModel, **options: Any) -> Any:
    return hf_polyspec.generation.doors.generate(model, **options)


DOORS: list[Callable[..., Any]] = [enabled, attached, mixed_in, callable_given, recipe, function]
