# SPDX-License-Identifier: Apache-2.0
"""Targets with an encoder: T5, BART, Marian, Whisper and Speech2Text under chains, against plain generation."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from encoder_models import FAMILIES, inputs, seq_to_seq
from same_seed import check
from tiny_models import noisy, tiny
from transformers import EncoderDecoderCache, WhisperForCausalLM

import hf_polyspec
from hf_polyspec import SuffixDrafter

NEW = 20


@pytest.fixture(scope="module")
def models() -> dict[str, Any]:
    return {family: hf_polyspec.attach(seq_to_seq(family)) for family in FAMILIES}


class Passes:
    """Counts a model's forward passes."""

    def __init__(self, model: Any) -> None:
        self.count = 0
        self.hook = model.register_forward_hook(self._add)

    def _add(self, *_: Any) -> None:
        self.count += 1


def twice(model: Any, levels: list[Any], **options: Any) -> tuple[Any, Any, int]:
    """What plain generation and a chain say after one seed, and the chain's passes of the target."""
    torch.manual_seed(4)
    plain = model.generate(max_new_tokens=NEW, **options)
    passes = Passes(model)
    torch.manual_seed(4)
    found = model.generate(max_new_tokens=NEW, assistant_models=levels, **options)
    passes.hook.remove()
    return plain, found, passes.count


@pytest.mark.parametrize("sample", [False, True], ids=["greedy", "sampled"])
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_copy_as_drafter(models: dict[str, Any], family: str, batch: int, sample: bool) -> None:
    """The same text in at most 0.4 passes a token."""
    model = models[family]
    plain, found, passes = twice(model, [noisy(model, 0.0)], do_sample=sample, **inputs(family, batch))
    assert torch.equal(found, plain)
    assert passes <= 0.4 * NEW


@pytest.mark.parametrize("levels", ["int8", "noisy"])
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("family", FAMILIES)
def test_three_levels(models: dict[str, Any], family: str, batch: int, levels: str) -> None:
    """With a middle that is a copy in fewer bits, which takes the target's encoder outputs, or has its own encoder."""
    model = models[family]
    middle = "int8" if levels == "int8" else noisy(model, 0.05)
    for sample in (False, True):
        plain, found, passes = twice(model, [middle, SuffixDrafter()], do_sample=sample, **inputs(family, batch))
        assert torch.equal(found, plain)
        assert passes < NEW


@pytest.mark.parametrize("family", ["t5", "speech_to_text"])
def test_outputs_are_plain_generations(models: dict[str, Any], family: str) -> None:
    """Every field, with the shapes of every step; the cache holds all but the last token."""
    model = copy.deepcopy(models[family])
    model.set_attn_implementation("eager")
    asked = {"output_scores", "output_logits", "output_hidden_states", "output_attentions", "return_dict_in_generate"}
    options = {**dict.fromkeys(asked, True), "do_sample": False, **inputs(family, 2)}
    plain, found, _ = twice(model, [noisy(model, 0.02), SuffixDrafter()], **options)
    assert type(found) is type(plain)
    assert [name for name in found if name != "polyspec"] == list(plain)
    for name in set(plain) - {"sequences"}:
        compare(name, plain[name], found[name])


def test_a_decoder_that_hands_out_no_attentions_to_the_encoder(models: dict[str, Any]) -> None:
    """T5's in some releases: asked for them, it hands out those of no layer, which is one empty tuple a step."""
    model = copy.deepcopy(models["t5"])
    model.set_attn_implementation("eager")

    def without(module: Any, given: Any, output: Any) -> Any:
        output["cross_attentions"] = ()
        return output

    model.register_forward_hook(without)
    options = {"output_attentions": True, "return_dict_in_generate": True, "do_sample": False, **inputs("t5", 2)}
    plain, found, _ = twice(model, [SuffixDrafter()], **options)
    assert found.cross_attentions == plain.cross_attentions == ((),) * len(plain.decoder_attentions)


def compare(name: str, one: Any, other: Any) -> None:
    if isinstance(one, EncoderDecoderCache):
        for part in ("self_attention_cache", "cross_attention_cache"):
            layers = zip(getattr(one, part).layers, getattr(other, part).layers, strict=True)
            for mine, theirs in layers:
                assert torch.allclose(mine.keys, theirs.keys, atol=1e-4), part
                assert torch.allclose(mine.values, theirs.values, atol=1e-4), part
        assert one.is_updated == other.is_updated
    elif isinstance(one, tuple):
        assert len(one) == len(other), name
        for a, b in zip(one, other, strict=True):
            compare(name, a, b)
    else:
        assert one.shape == other.shape, name
        assert torch.allclose(one, other, atol=1e-4, equal_nan=True), name


def test_rows_that_end_early_and_several_texts_of_each(models: dict[str, Any]) -> None:
    """Encoder outputs and their keys follow the rows that are left, and are repeated with them."""
    model = models["bart"]
    options = {"num_return_sequences": 3, "eos_token_id": [7, 8, 9, 10, 11, 12], **inputs("bart", 2)}
    for seed in range(3):
        check(model, [noisy(model, 0.05), SuffixDrafter()], seed, **options)


def test_a_decoder_prompt_with_padding(models: dict[str, Any]) -> None:
    """Whisper gives padded rows positions of their own."""
    model = models["whisper"]
    prompt = torch.tensor([[1, 1, 3, 9], [3, 11, 5, 4]])
    given = {"decoder_input_ids": prompt, "decoder_attention_mask": (prompt != 1).long(), **inputs("whisper", 2)}
    plain, found, passes = twice(model, [noisy(model, 0.0)], do_sample=False, **given)
    assert torch.equal(found, plain)
    assert passes <= 0.4 * NEW


def test_whispers_own_long_form(models: dict[str, Any]) -> None:
    """Segments, time stamps and their processors: Whisper's generate() calls the chain for every piece."""
    model = copy.deepcopy(models["whisper"])
    hf_polyspec.detach(model)
    hf_polyspec.attach(model)
    model.generation_config.eos_token_id = 2
    model.generation_config.suppress_tokens, model.generation_config.begin_suppress_tokens = [5, 6], [8]
    model.generation_config.no_timestamps_token_id, model.generation_config.max_initial_timestamp_index = 40, 3
    heard = torch.randn(2, 8, 150, generator=torch.Generator().manual_seed(1))
    options = {"return_timestamps": True, "attention_mask": torch.ones(2, 150, dtype=torch.long), "do_sample": False}
    plain, found, passes = twice(model, [noisy(model, 0.0)], input_features=heard, **options)
    assert torch.equal(found, plain)
    assert plain.shape[1] > NEW, "several segments"
    assert passes <= plain.shape[1] * 2 * 0.4


def test_a_decoder_alone_attends_to_the_targets_encoder(models: dict[str, Any]) -> None:
    """As distilled Whispers do."""
    model = models["whisper"]
    config = copy.deepcopy(model.config)
    config.is_encoder_decoder = False
    drafter = WhisperForCausalLM(config).eval()
    drafter.model.decoder.load_state_dict(model.model.decoder.state_dict())
    drafter.proj_out.load_state_dict(model.proj_out.state_dict())
    for batch in (1, 2):
        plain, found, passes = twice(model, [drafter], do_sample=True, **inputs("whisper", batch))
        assert torch.equal(found, plain)
        assert passes <= 0.4 * NEW


def test_given_encoder_outputs(models: dict[str, Any]) -> None:
    """A copy takes them; a model with another encoder has nothing to read."""
    model = models["t5"]
    given = inputs("t5", 2)
    outputs = model.get_encoder()(**given)
    asked = {"encoder_outputs": outputs, "attention_mask": given["attention_mask"], "do_sample": False}
    plain, found, _ = twice(model, [noisy(model, 0.0)], **asked)
    assert torch.equal(found, plain)
    with pytest.raises(ValueError, match=r"assistant_models\[0\] .* has an encoder of its own, and encoder_outputs"):
        model.generate(**asked, max_new_tokens=2, assistant_models=[seq_to_seq("t5", seed=1, num_decoder_layers=1)])


def test_what_is_refused(models: dict[str, Any]) -> None:
    model, given = models["t5"], inputs("t5", 1)
    with pytest.raises(ValueError, match=r"assistant_models\[0\] \(T5.*\) has an encoder, and the target has none"):
        hf_polyspec.attach(tiny("llama")).generate(given["input_ids"], max_new_tokens=2, assistant_models=[model])
    cache = model.generate(**given, max_new_tokens=3, return_dict_in_generate=True)
    held = cache.get("cache", cache.get("past_key_values"))
    name = "cache" if "cache" in cache else "past_key_values"
    again = {**given, name: held, "decoder_input_ids": cache.sequences, "max_new_tokens": 2}
    with pytest.raises(ValueError, match="a filled cache of an encoder-decoder model"):
        model.generate(**again, assistant_models=["suffix"])
    embeds = torch.zeros(1, 2, 32)
    with pytest.raises(ValueError, match="decoder_inputs_embeds is not supported with assistant_models"):
        model.generate(**given, decoder_inputs_embeds=embeds, max_new_tokens=2, assistant_models=["suffix"])
    narrow = copy.deepcopy(models["whisper"].config)
    narrow.is_encoder_decoder, narrow.d_model = False, 16
    with pytest.raises(ValueError, match="attends to encoder states of width 16, and those of the target have 32"):
        models["whisper"].generate(
            **inputs("whisper", 1), max_new_tokens=2, assistant_models=[WhisperForCausalLM(narrow).eval()]
        )
