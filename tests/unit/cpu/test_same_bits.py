# SPDX-License-Identifier: Apache-2.0
"""A packed model gives the same logits to the last bit with a chain and without: 16 bits break no tie differently."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_polyspec.cpu.compiled import compiles

if not compiles():
    pytest.skip("compiled functions do not run here", allow_module_level=True)

import hf_polyspec
from hf_polyspec.cpu.compiled.dots import has_dots
from hf_polyspec.quantization import pack

Tiny = Callable[..., PreTrainedModel]
IDS = torch.randint(3, 48, (1, 50), generator=torch.Generator().manual_seed(3))
NEW = 40


def _answer(model: PreTrainedModel, **given: Any) -> tuple[Tensor, Tensor, Any]:
    found = hf_polyspec.generate(
        model,
        IDS,
        attention_mask=torch.ones_like(IDS),
        max_new_tokens=NEW,
        min_new_tokens=NEW,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
        **given,
    )
    return found.sequences, torch.cat(found.logits), found


@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("size", [8, 32])
def test_logits_with_a_chain_and_without(tiny: Tiny, family: str, dtype: torch.dtype, size: int) -> None:
    model = pack(copy.deepcopy(tiny(family, initializer_range=0.1, head_dim=size)).to(dtype))
    text, logits, _ = _answer(model)
    suffix = hf_polyspec.SuffixDrafter
    chains: list[list[Any]] = [[suffix()]]
    if has_dots():
        chains += [["int8"], ["int8", suffix()]]
    for members in chains:
        found, others, output = _answer(model, assistant_models=members, num_assistant_tokens=7)
        assert torch.equal(found, text)
        assert torch.equal(others, logits)
        assert output.polyspec.levels[0].forward_passes < NEW, "passes over several tokens"
