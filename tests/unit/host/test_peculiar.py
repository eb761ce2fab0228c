# SPDX-License-Identifier: Apache-2.0
"""What is found by looking at a model's class and code: windows without masks, a generate() of its own, wholes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from encoder_models import seq_to_seq
from tiny_models import prompts, tiny
from transformers import MusicgenMelodyDecoderConfig, MusicgenMelodyForCausalLM

from hf_polyspec.bench.measurements.tiny_models import tiny_model
from hf_polyspec.host.compatibility import check_model
from hf_polyspec.host.modeling import AutoModelForCausalLM, AutoModelForImageTextToText
from hf_polyspec.host.peculiar import as_target, check_generate, check_window


def test_a_window_that_is_only_in_the_cache_is_served_up_to_its_length(enabled: None) -> None:
    model = tiny_model("moshi", AutoModelForCausalLM, {"sliding_window": 16})
    call = {**prompts(1), "do_sample": False}
    length = call["input_ids"].shape[1]
    plain = model.generate(**call, max_new_tokens=16 - length)
    assert model.generate(**call, max_new_tokens=16 - length, assistant_models=[model]).tolist() == plain.tolist()
    plain = model.generate(**call, max_new_tokens=24 - length)
    with pytest.warns(UserWarning, match=r"no mask for its window of 16 tokens.*max_length=16.* without assistants"):
        got = model.generate(**call, max_new_tokens=24 - length, assistant_models=[model])
    assert got.tolist() == plain.tolist()


@pytest.mark.parametrize("kind", ["mistral", "gemma3_text", "exaone4", "llama4_text"])
def test_windows_in_masks_are_found(kind: str) -> None:
    """In a method, in a function beside the class, and in one that is written within a method."""
    own: dict[str, Any] = {"layer_types": ["sliding_attention", "full_attention"]} if kind == "exaone4" else {}
    check_window(tiny_model(kind, AutoModelForCausalLM, own), None)


class _Own(torch.nn.Module):
    def generate(self) -> None:
        pass


class _Whole(torch.nn.Module):
    def __init__(self, part: Any) -> None:
        super().__init__()
        self.part = part


def test_a_class_with_its_own_generate_is_told_from_others() -> None:
    with pytest.raises(ValueError, match=r"generate\(\) of _Own is the class's own"):
        check_generate(_Own())
    check_generate(tiny("llama"))
    sizes = {"num_hidden_layers": 1, "num_attention_heads": 2, "hidden_size": 16, "ffn_dim": 16}
    config = MusicgenMelodyDecoderConfig(vocab_size=48, **sizes)
    with pytest.raises(ValueError, match=r"generate\(\) of MusicgenMelodyForCausalLM is the class's own"):
        check_generate(MusicgenMelodyForCausalLM(config))
    check_generate(tiny_model("blip-2", AutoModelForImageTextToText))
    check_generate(seq_to_seq("whisper"))  # by a further method of its own


def test_a_whole_whose_head_is_within_its_language_model_is_no_model_without_one() -> None:
    check_model(tiny_model("nemotron_h_omni", AutoModelForImageTextToText), "the target")


def test_a_whole_lends_the_part_of_the_targets_class() -> None:
    target, part = tiny("llama"), tiny("llama")
    whole = tiny("mistral")
    whole.inner = part
    assert as_target(target, whole) is part
    assert as_target(target, part) is part
    assert as_target(target, _Whole(part)).part is part, "only what makes text itself"
    whole.other = tiny("llama")
    assert as_target(target, whole) is whole, "which of the two is meant nobody knows"


def test_attention_that_says_it_is_causal_is_believed() -> None:
    """BERT has to be told; a class that only has BERT's words in its config has not."""
    with pytest.raises(ValueError, match="attends to both sides"):
        check_model(tiny("bert", attention="eager"), "the target")
    model = tiny("llama")
    model.config.is_decoder, model.config.add_cross_attention = False, False
    check_model(model, "the target")


def test_one_row_with_hidden_columns_is_a_padded_one(enabled: None) -> None:
    """GIT does not mind a mask when it reads several tokens after a cache, which shows in a row alone as well."""
    model = tiny_model("git", AutoModelForCausalLM)
    call = {**prompts(1), "max_new_tokens": 9, "do_sample": False}
    assert model.generate(**call, assistant_models=[model]).tolist() == model.generate(**call).tolist()
    call["attention_mask"][:, 1:6] = 0
    plain = model.generate(**call)
    with pytest.warns(UserWarning, match=r"\(GitForCausalLM\) does not mind the padding"):
        assert model.generate(**call, assistant_models=[model]).tolist() == plain.tolist()
