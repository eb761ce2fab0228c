# SPDX-License-Identifier: Apache-2.0
"""Pictures in the prompt: what the first pass is given, positions of three dimensions after it, trees, second turns."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_models import head_for, noisy
from transformers import PreTrainedModel, Qwen2AudioForConditionalGeneration, VoxtralForConditionalGeneration

import hf_polyspec
from hf_polyspec import SuffixDrafter
from hf_polyspec.bench.measurements.tiny_models import tiny_config, tiny_model
from hf_polyspec.bench.measurements.tiny_pictures import SEEING, pictured
from hf_polyspec.host.embeddings import reads_any
from hf_polyspec.host.modeling import AutoModelForCausalLM, AutoModelForImageTextToText
from hf_polyspec.host.pictures import shown
from hf_polyspec.host.release import GENERATION_CACHE, cache_argument

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


def chains(model: Any) -> list[list[Any]]:
    return [[noisy(model, 0.0)], [noisy(model, 0.02), noisy(model, 0.05, seed=2)], [SuffixDrafter(min_match=1)]]


@pytest.mark.parametrize("kind", ["idefics3", "qwen3_vl"])
def test_rows_that_end_early_leave(enabled: None, kind: str) -> None:
    """What goes with every pass goes on with the rows that are left."""
    model = seeing(kind)
    inputs = pictured(model, 3)
    ends = [int(row[-11]) for row in made(model, **inputs, **LENGTH)[:2]]
    plain = made(model, **inputs, **LENGTH, eos_token_id=ends)
    for chain in chains(model):
        assert made(model, **inputs, **LENGTH, eos_token_id=ends, assistant_models=chain).tolist() == plain.tolist()


@pytest.mark.parametrize("kind", ["gemma3", "qwen2_5_vl", "qwen3_5"])
def test_a_second_turn_goes_on_behind_pictures(enabled: None, kind: str) -> None:
    """From the cache that was handed back: text alone, at the positions that the first turn's pictures leave."""
    model = seeing(kind)
    inputs = pictured(model, 2)
    more = torch.randint(3, 40, (2, 5), generator=torch.Generator().manual_seed(9))

    def turns(**chain: Any) -> list[list[int]]:
        first = made(model, **inputs, **LENGTH, return_dict_in_generate=True, **chain)
        ids = torch.cat([first.sequences, more], dim=1)
        mask = torch.cat([inputs["attention_mask"], torch.ones(2, ids.shape[1] - inputs["input_ids"].shape[1])], dim=1)
        cache = {cache_argument(model) or "": getattr(first, GENERATION_CACHE)}
        second = made(model, input_ids=ids, attention_mask=mask.long(), **cache, **LENGTH, **chain)
        found: list[list[int]] = second.tolist()
        return found

    plain = turns()
    for chain in chains(model):
        assert turns(assistant_models=chain) == plain


def test_videos(enabled: None) -> None:
    """Frames have positions in time; the seconds of each go with every pass in some classes."""
    model = seeing("qwen2_5_vl")
    still = pictured(model, 2)
    ids = still["input_ids"].clone()
    place = model.config.image_token_id
    ids[ids == place] = model.config.video_token_id
    inputs = {
        "input_ids": ids,
        "attention_mask": still["attention_mask"],
        "mm_token_type_ids": 2 * (still["input_ids"] == place).long(),
        "pixel_values_videos": still["pixel_values"],
        "video_grid_thw": still["image_grid_thw"],
        "second_per_grid_ts": torch.tensor([1.0, 2.0]),
    }
    for law in (LENGTH, DRAWN):
        plain = made(model, **inputs, **law)
        for chain in chains(model):
            assert made(model, **inputs, **law, assistant_models=chain).tolist() == plain.tolist()


def hearing(kind: type[PreTrainedModel]) -> PreTrainedModel:
    """Hears 16 frames as four tokens."""
    ears = {
        **dict.fromkeys(("num_mel_bins", "max_source_positions"), 8),
        **dict.fromkeys(("hidden_size", "d_model"), 16),
        **dict.fromkeys(("num_hidden_layers", "encoder_layers"), 1),
        **dict.fromkeys(("num_attention_heads", "encoder_attention_heads"), 2),
        "intermediate_size": 32,
        "encoder_ffn_dim": 32,
        "model_type": "voxtral_encoder" if kind is VoxtralForConditionalGeneration else "qwen2_audio_encoder",
    }
    config = tiny_config(str(kind.config_class.model_type), {"audio_config": ears, "audio_token_id": 41})
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = kind(config).eval()
        for parameter in model.get_output_embeddings().parameters():
            parameter.data = torch.randn(parameter.shape)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


@pytest.mark.parametrize("kind", [VoxtralForConditionalGeneration, Qwen2AudioForConditionalGeneration])
@pytest.mark.parametrize("law", [LENGTH, {**DRAWN, "num_return_sequences": 2}], ids=["greedy", "sampled"])
def test_sounds(enabled: None, kind: type[PreTrainedModel], law: dict[str, Any]) -> None:
    model = hearing(kind)
    ids = torch.randint(3, 40, (2, 13), generator=torch.Generator().manual_seed(3))
    ids[0, :4] = ids[1, 1:5] = 41
    mask = torch.ones_like(ids)
    ids[1, 0] = mask[1, 0] = 0
    sounds = torch.randn(2, 8, 16, generator=torch.Generator().manual_seed(4))
    inputs = {"input_ids": ids, "attention_mask": mask, "input_features": sounds}
    if kind is Qwen2AudioForConditionalGeneration:
        inputs["feature_attention_mask"] = torch.ones(2, 16, dtype=torch.long)
    plain = made(model, **inputs, **law)
    assert made(model, **{**inputs, "input_features": -sounds}, **law).tolist() != plain.tolist()
    for chain in chains(model):
        assert made(model, **inputs, **law, assistant_models=chain).tolist() == plain.tolist()


def test_behind_pictures_that_become_columns_of_the_cache_the_target_generates_alone(enabled: None) -> None:
    """GIT reads them in front of the text; without a picture it is a target like any other."""
    model = seeing("git")
    inputs = pictured(model, 1)
    with pytest.warns(UserWarning, match=r"the target \(GitForCausalLM\) keeps 5 columns for pixel_values"):
        got = model.generate(**inputs, **LENGTH, assistant_models=[SuffixDrafter()])
    assert got.tolist() == made(model, **inputs, **LENGTH).tolist()
    del inputs["pixel_values"]
    plain = made(model, **inputs, **LENGTH)
    assert made(model, **inputs, **LENGTH, assistant_models=[SuffixDrafter(min_match=1)]).tolist() == plain.tolist()


# Of releases before 5.20: about what their own class hands to itself.
@pytest.mark.filterwarnings("ignore:`hidden_state` is deprecated:FutureWarning")
@pytest.mark.parametrize("length", [9, 20, 40])
def test_layers_that_hold_pictures_alone_are_never_cut(enabled: None, length: int) -> None:
    """Llama 3.2's layers that attend to pictures: 20 columns, at times as many as the text has."""
    model = seeing("mllama")
    inputs: dict[str, Any] = pictured(model, 2)
    ids = torch.randint(3, 40, (2, length), generator=torch.Generator().manual_seed(6))
    mask = torch.ones_like(ids)
    ids[1, 0] = mask[1, 0] = 0
    inputs |= {"input_ids": ids, "attention_mask": mask}
    inputs["cross_attention_mask"] = torch.ones(2, length, 1, 4, dtype=torch.long)
    end = int(made(model, **inputs, **LENGTH)[1][-9])
    everything = [*chains(model), [hf_polyspec.quantize_model(model, bits=8), SuffixDrafter(min_match=1)]]
    for law in (LENGTH, DRAWN, {**DRAWN, "num_return_sequences": 2}, {**LENGTH, "eos_token_id": end}):
        plain = made(model, **inputs, **law)
        for chain in everything:
            assert made(model, **inputs, **law, assistant_models=chain).tolist() == plain.tolist()
    trees = {"assistant_models": [head_for(model)], "polyspec_tree_tokens": 20, "polyspec_tree_top_k": 10}
    assert made(model, **inputs, **LENGTH, **trees).tolist() == made(model, **inputs, **LENGTH).tolist()
    dark = {**inputs, "pixel_values": torch.zeros_like(inputs["pixel_values"])}
    assert made(model, **dark, **LENGTH).tolist() != made(model, **inputs, **LENGTH).tolist()


@pytest.mark.parametrize("tokens", [4, 1])
@pytest.mark.parametrize("copies", [1, 2])
def test_a_smaller_level_of_the_class_sees_with_its_own_encoder(enabled: None, tokens: int, copies: int) -> None:
    """As wide as its own text model wants them; a picture of another number of tokens would not fit the prompt."""
    model = seeing("gemma3")
    small = tiny_model(
        "gemma3", AutoModelForImageTextToText, {"mm_tokens_per_image": tokens, "text_config": {"hidden_size": 16}}
    )
    inputs = pictured(model, 2)
    reads = bool(shown(model, inputs)) and tokens == 4  # older releases hand pixels on, and a level sees ids
    seen: list[Any] = []

    def note(_module: Any, _args: Any, given: dict[str, Any]) -> None:
        seen.append(given.get("mm_encoder_outputs"))

    small.register_forward_pre_hook(note, with_kwargs=True)
    law = {**DRAWN, "num_return_sequences": copies}
    plain = made(model, **inputs, **law)
    for chain in ([small], [small, SuffixDrafter(min_match=1)]):
        seen.clear()
        assert made(model, **inputs, **law, assistant_models=chain).tolist() == plain.tolist()
        read = [one["image"].pooler_output for one in seen if one]
        assert len(read) == int(reads), "the pass that reads the prompt, and no other"
        for pictures in read:
            assert [tuple(one.shape) for one in pictures] == [(4, 16)] * 2 * copies


def test_what_reads_no_text_without_pictures_cannot_be_tried(enabled: None) -> None:
    """IDEFICS wants a picture in every pass, and says so of itself."""
    model = seeing("idefics")
    inputs = pictured(model, 1)
    with pytest.warns(
        UserWarning, match=r"\(IdeficsForVisionText2Text\) cannot be tried .* of text alone \(.*pixel_values"
    ):
        got = model.generate(**inputs, **LENGTH, assistant_models=[SuffixDrafter()])
    assert got.tolist() == model.generate(**inputs, **LENGTH).tolist()


@pytest.mark.parametrize("named", [True, False], ids=["with ids", "without ids"])
@pytest.mark.parametrize("kind", ["llava", "qwen2_5_vl"])
def test_pictures_behind_embeddings(enabled: None, kind: str, named: bool) -> None:
    """A level looks for pictures in ids where there are any, and else in no other model's embeddings."""
    model = seeing(kind)
    inputs = pictured(model, 2)
    ids = inputs.pop("input_ids")
    inputs["inputs_embeds"] = model.get_input_embeddings()(ids).detach()
    inputs |= {"input_ids": ids} if named else {}
    plain = made(model, **inputs, **LENGTH)
    for chain in chains(model):
        found = made(model, **inputs, **LENGTH, assistant_models=chain, return_dict_in_generate=True)
        assert found.sequences.tolist() == plain.tolist()
        drafts = not isinstance(chain[-1], SuffixDrafter)
        assert found.polyspec.levels[0].drafted > 0 or not drafts


def test_a_level_that_reads_no_other_models_embeddings(enabled: None) -> None:
    """Gemma 4 looks up the ids of embeddings, and finds none of another model's."""
    model = tiny_model("gemma4_text", AutoModelForCausalLM)
    ids = torch.randint(3, 40, (2, 7), generator=torch.Generator().manual_seed(2))
    embeds = model.get_input_embeddings()(ids).detach()
    middle = noisy(model, 0.03)
    assert not reads_any(middle)
    for given in ({"inputs_embeds": embeds}, {"inputs_embeds": embeds, "input_ids": ids}):
        plain = made(model, **given, **LENGTH)
        for chain in ([middle], [middle, noisy(model, 0.05, seed=2)]):
            found = made(model, **given, **LENGTH, assistant_models=chain, return_dict_in_generate=True)
            assert found.sequences.tolist() == plain.tolist()
            assert found.polyspec.levels[0].accepted > 0


@pytest.mark.filterwarnings("ignore:`hidden_state` is deprecated:FutureWarning")  # as above
@pytest.mark.parametrize("more", [{}, {"use_cache": False}, {"cache_implementation": "static"}], ids=str)
def test_maps_of_layers_that_attend_to_pictures(enabled: None, more: dict[str, Any]) -> None:
    """Llama 3.2's have as many columns as there are of pictures, at every step."""
    model = seeing("mllama")
    call = {**pictured(model, 2), "max_new_tokens": 5, "do_sample": False, "return_dict_in_generate": True, **more}
    plain = made(model, **call, output_attentions=True)
    assert plain.attentions[-1][1].shape[-1] == 20
    for chain in chains(model):
        found = made(model, **call, output_attentions=True, assistant_models=chain)
        assert found.sequences.tolist() == plain.sequences.tolist()
        for mine, theirs in zip(found.attentions, plain.attentions, strict=True):
            assert [layer.shape for layer in mine] == [layer.shape for layer in theirs]
            for one, other in zip(mine, theirs, strict=True):
                torch.testing.assert_close(one[..., -1:, :], other[..., -1:, :], rtol=1e-3, atol=1e-4)


def test_new_tokens_are_of_the_kind_that_the_class_gives_them(enabled: None) -> None:
    """PaliGemma's prompt sees both ways and its answer does not, which without a cache every pass must be told."""
    model = seeing("paligemma")
    for call in ({"input_ids": pictured(model, 2)["input_ids"]}, pictured(model, 2)):
        given = {**call, "token_type_ids": torch.zeros_like(call["input_ids"])}
        if "pixel_values" not in call:
            given["input_ids"] = torch.randint(3, 40, (2, 9), generator=torch.Generator().manual_seed(8))
            given["token_type_ids"] = torch.zeros(2, 9, dtype=torch.long)
        for more in ({}, {"use_cache": False}):
            more |= {"suppress_tokens": list(range(40, 48))}  # among which is what stands for a picture
            plain = made(model, **given, **LENGTH, **more)
            for chain in chains(model):
                assert made(model, **given, **LENGTH, **more, assistant_models=chain).tolist() == plain.tolist()
