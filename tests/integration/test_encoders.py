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
from hf_polyspec.host.release import GENERATION_CACHE

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


@pytest.mark.parametrize("ids", ["all", "new"])
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_second_turn(models: dict[str, Any], family: str, rows: int, ids: str) -> None:
    """From the cache that was handed back, which holds the encoder's keys and values too; scores and caches are plain
    generation's, and the first turn's cache goes on as after plain generation. A mask says that the ids are all."""
    model, given = models[family], inputs(family, rows)
    more = {"return_dict_in_generate": True, "output_scores": True, "do_sample": False}

    def turns(*, first: dict[str, Any], second: dict[str, Any]) -> Any:
        found = model.generate(**given, **more, max_new_tokens=5, **first)
        held = {GENERATION_CACHE: found[GENERATION_CACHE], "decoder_input_ids": found.sequences}
        if ids == "all" and family != "whisper":  # whose own generate() has no such argument
            held["decoder_attention_mask"] = torch.ones_like(found.sequences)
        return model.generate(**given, **held, **more, max_new_tokens=6, **second)

    plain = turns(first={}, second={})
    for chain in (["suffix"], [noisy(model, 0.0)], [noisy(model, 0.02), noisy(model, 0.05, seed=2)]):
        for first in ({}, {"assistant_models": chain}):
            found = turns(first=first, second={"assistant_models": chain})
            assert found.sequences.tolist() == plain.sequences.tolist()
            torch.testing.assert_close(found.scores, plain.scores, rtol=1e-3, atol=1e-3)
            for part in ("self_attention_cache", "cross_attention_cache"):
                mine, theirs = (getattr(one[GENERATION_CACHE], part).layers for one in (found, plain))
                for one, other in zip(mine, theirs, strict=True):
                    torch.testing.assert_close(one.keys, other.keys, rtol=1e-3, atol=1e-3)
                    torch.testing.assert_close(one.values, other.values, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("rows", [1, 2])
def test_padding_ids_in_a_text_that_is_not_masked(models: dict[str, Any], rows: int) -> None:
    """Speech2Text counts the ids of a pass that are not its padding's; plain generation's passes have one id each, and
    without a cache all of them."""
    model, given = models["speech_to_text"], inputs("speech_to_text", rows)
    padding = int(model.config.pad_token_id)
    given["decoder_input_ids"] = torch.tensor([[3, padding, 7, padding, 9]]).expand(rows, -1)
    drawn = {"do_sample": True, "top_k": 0, "temperature": 2.0, "sequence_bias": {(padding,): 2.0}}
    more = {**given, **drawn, "max_new_tokens": 20, "return_dict_in_generate": True, "output_scores": True}

    def made(**options: Any) -> Any:
        torch.manual_seed(6)
        return model.generate(**more, **options)

    plain = made()
    for row in plain.sequences[:, 5:].tolist():
        assert set(row[row.index(padding) :]) - {padding}, "the text goes on behind one"
    apart = made(use_cache=False)
    assert not torch.allclose(apart.scores[-1], plain.scores[-1], atol=1e-2), "it is read otherwise"
    for wanted, options in ((plain, {}), (apart, {"use_cache": False})):
        for chain in (["suffix"], [noisy(model, 0.0)], [noisy(model, 0.05)]):
            found = made(**options, assistant_models=chain)
            assert found.sequences.tolist() == wanted.sequences.tolist()
            torch.testing.assert_close(found.scores, wanted.scores, rtol=1e-3, atol=1e-3)


def test_what_is_refused(models: dict[str, Any]) -> None:
    model, given = models["t5"], inputs("t5", 1)
    with pytest.raises(ValueError, match=r"assistant_models\[0\] \(T5.*\) has an encoder, and the target has none"):
        hf_polyspec.attach(tiny("llama")).generate(given["input_ids"], max_new_tokens=2, assistant_models=[model])
    narrow = copy.deepcopy(models["whisper"].config)
    narrow.is_encoder_decoder, narrow.d_model = False, 16
    with pytest.raises(ValueError, match="attends to encoder states of width 16, and those of the target have 32"):
        models["whisper"].generate(
            **inputs("whisper", 1), max_new_tokens=2, assistant_models=[WhisperForCausalLM(narrow).eval()]
        )
