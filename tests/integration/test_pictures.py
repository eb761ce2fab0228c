# SPDX-License-Identifier: Apache-2.0
"""Pictures in the prompt: what the first pass is given, positions of three dimensions after it, trees, second turns."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_models import head_for
from transformers import PreTrainedModel

from hf_polyspec.bench.measurements.tiny_models import tiny_model
from hf_polyspec.bench.measurements.tiny_pictures import SEEING, pictured
from hf_polyspec.host.modeling import AutoModelForImageTextToText

LENGTH = {"max_new_tokens": 16, "do_sample": False}
DRAWN = {"max_new_tokens": 16, "do_sample": True, "top_k": 0}


def seeing(kind: str) -> PreTrainedModel:
    model: PreTrainedModel = tiny_model(kind, AutoModelForImageTextToText, SEEING.get(kind))
    return model


def made(model: Any, *, seed: int = 7, **given: Any) -> Any:
    torch.manual_seed(seed)
    return model.generate(**given)


@pytest.mark.parametrize("kind", ["gemma3", "qwen2_5_vl"])
@pytest.mark.parametrize("law", [LENGTH, DRAWN], ids=["greedy", "sampled"])
def test_trees_grow_behind_pictures(enabled: None, kind: str, law: dict[str, Any]) -> None:
    """Siblings share a position, in every dimension of it."""
    model = seeing(kind)
    inputs = pictured(model, 2)
    trees = {"assistant_models": [head_for(model)], "polyspec_tree_tokens": 20, "polyspec_tree_top_k": 10}
    found = made(model, **inputs, **law, **trees, return_dict_in_generate=True)
    assert found.sequences.tolist() == made(model, **inputs, **law).tolist()
    assert not found.polyspec.levels[0].notes, "chains instead of trees"
    assert found.polyspec.levels[-1].accepted > 3
