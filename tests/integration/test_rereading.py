# SPDX-License-Identifier: Apache-2.0
"""Models that keep nothing of what they have read: each pass reads the whole text, and checks a draft besides."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_models import noisy, prompts, tiny
from transformers import PreTrainedModel

from hf_polyspec.bench.measurements.tiny_models import tiny_model
from hf_polyspec.host.modeling import AutoModelForCausalLM
from hf_polyspec.host.release import GENERATION_CACHE
from hf_polyspec.host.rereading import rereads

NEW = 14


@pytest.fixture
def model() -> Any:
    return tiny_model("openai-gpt", AutoModelForCausalLM)


@pytest.mark.parametrize("batch", [1, 3])
def test_text_is_plain_generations_and_drafting_takes_part(enabled: None, model: Any, batch: int) -> None:
    call = {**prompts(batch), "max_new_tokens": NEW, "do_sample": False, "return_dict_in_generate": True}
    plain = model.generate(**call)
    for chain, most in (([noisy(model, 0.0)], 0.4), ([noisy(model, 0.03), noisy(model, 0.06, seed=2)], 1.0)):
        got = model.generate(**call, assistant_models=chain, num_assistant_tokens=5)
        assert got.sequences.tolist() == plain.sequences.tolist()
        assert got.polyspec.levels[0].forward_passes <= most * NEW
        assert type(got[GENERATION_CACHE]) is type(plain[GENERATION_CACHE])


def test_under_a_target_with_a_cache(enabled: None, model: Any, target: PreTrainedModel) -> None:
    call = {**prompts(2), "max_new_tokens": NEW, "do_sample": False}
    plain = target.generate(**call).tolist()
    for chain in ([model], [model, noisy(target, 0.05)], [noisy(target, 0.05), model]):
        assert target.generate(**call, assistant_models=chain).tolist() == plain


def test_a_class_that_reads_a_text_both_ways_is_no_assistant(enabled: None, target: PreTrainedModel) -> None:
    """As a target it generates alone."""
    model, call = tiny_model("xlnet", AutoModelForCausalLM), {**prompts(1), "max_new_tokens": 4, "do_sample": False}
    sentence = r"\(XLNetLMHeadModel\) is fed other ids than those of the text"
    with pytest.raises(ValueError, match=sentence):
        target.generate(**call, assistant_models=[model])
    with pytest.warns(UserWarning, match=sentence):
        got = model.generate(**call, assistant_models=[target])
    assert got.tolist() == model.generate(**call).tolist()


class _LooksAhead(torch.nn.Module):
    """Every token's logits move with what follows it."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model, self.config, self.dtype = model, model.config, model.dtype

    def get_input_embeddings(self) -> Any:
        return self.model.get_input_embeddings()

    def forward(self, input_ids: torch.Tensor, return_dict: bool = True) -> Any:
        output = self.model(input_ids=input_ids)
        output.logits = output.logits + output.logits.mean(dim=1, keepdim=True)
        return output


def test_only_what_keeps_nothing_and_looks_back_only(model: Any) -> None:
    assert rereads(model)
    assert not rereads(_LooksAhead(model))
    for kind in ("llama", "xlnet", "rwkv"):
        assert not rereads(tiny(kind) if kind == "llama" else tiny_model(kind, AutoModelForCausalLM))
