# SPDX-License-Identifier: Apache-2.0
"""Further forward arguments: what plain generation hands on in each pass, and what it changes on the way."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_models import COMMON, noisy, prompts, tiny
from transformers import (
    AutoModelForImageTextToText,
    LlavaConfig,
    PaliGemmaConfig,
    PreTrainedModel,
    Qwen2VLConfig,
)

from hf_polyspec import SuffixDrafter
from hf_polyspec.host.forwarding import Extras, Forwarding
from hf_polyspec.host.release import GENERATION_CACHE

SIGHT = {
    "model_type": "siglip_vision_model",
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
    "vision_use_head": False,
}
IMAGE = 40
LENGTH = {"max_new_tokens": 12, "do_sample": False}


def seeing(kind: str) -> PreTrainedModel:
    """A tiny model that reads images of 8 by 8 pixels as four tokens."""
    words = {**COMMON, "head_dim": 8}
    if kind == "paligemma":
        config: Any = PaliGemmaConfig(
            text_config={"model_type": "gemma", **words},
            vision_config=SIGHT,
            image_token_index=IMAGE,
            projection_dim=32,
        )
    elif kind == "llava":
        config = LlavaConfig(
            text_config={"model_type": "llama", **words},
            vision_config=SIGHT,
            image_token_index=IMAGE,
            vision_feature_select_strategy="full",
            vision_feature_layer=-1,
        )
    else:
        rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
        eyes = {"depth": 1, "embed_dim": 16, "hidden_size": 32, "num_heads": 2, "patch_size": 4, "mlp_ratio": 2}
        config = Qwen2VLConfig(
            text_config={**words, "rope_parameters": rope}, vision_config=eyes, image_token_id=IMAGE, video_token_id=41
        )
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = AutoModelForImageTextToText.from_config(config).float().eval()
        for name, parameter in model.named_parameters():
            if "projector" in name or "merger" in name:
                parameter.data = torch.randn(parameter.shape)  # else pictures would hardly matter
        for parameter in model.get_output_embeddings().parameters():
            parameter.data = torch.randn(parameter.shape)  # tied to what it reads, it would only repeat it
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


def chains(model: PreTrainedModel) -> dict[str, list[Any]]:
    return {
        "suffix": [SuffixDrafter(min_match=1)],
        "a copy": [noisy(model, 0.0)],
        "two copies": [noisy(model, 0.02), noisy(model, 0.04, seed=2)],
        "a text model": [tiny("llama")],
    }


@pytest.mark.parametrize("kind", ["paligemma", "llava", "qwen2_vl"])
@pytest.mark.parametrize("rows", [1, 3])
def test_text_alone(enabled: None, kind: str, rows: int) -> None:
    """Classes whose generate() adds arguments, counts positions from one, or in three dimensions."""
    model = seeing(kind)
    inputs = prompts(rows, vocabulary=IMAGE)
    plain = model.generate(**inputs, **LENGTH)
    for name, chain in chains(model).items():
        found = model.generate(**inputs, **LENGTH, assistant_models=chain, return_dict_in_generate=True)
        assert found.sequences.tolist() == plain.tolist(), name
        if name == "a copy":
            assert found.polyspec.levels[0].forward_passes <= 6


@pytest.mark.parametrize("kind", ["paligemma", "llava"])
@pytest.mark.parametrize("rows", [1, 3])
def test_images_are_read_once(enabled: None, kind: str, rows: int) -> None:
    """The target and copies of it see the pictures; drafts may even guess the id that stands for one."""
    model = seeing(kind)
    inputs: dict[str, Any] = prompts(rows, vocabulary=IMAGE)
    inputs["input_ids"] = torch.cat([torch.full((rows, 4), IMAGE), inputs["input_ids"]], dim=1)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    inputs["pixel_values"] = torch.randn(rows, 3, 8, 8, generator=torch.Generator().manual_seed(4))
    if kind == "paligemma":
        inputs["token_type_ids"] = (inputs["input_ids"] == IMAGE).long()
    plain = model.generate(**inputs, **LENGTH)
    blind = model.generate(**{**inputs, "pixel_values": torch.zeros(rows, 3, 8, 8)}, **LENGTH)
    assert plain.tolist() != blind.tolist(), "a picture that changes nothing shows nothing"
    for name, chain in chains(model).items():
        found = model.generate(**inputs, **LENGTH, assistant_models=chain, return_dict_in_generate=True)
        assert found.sequences.tolist() == plain.tolist(), name
        if name == "a copy":
            assert found.polyspec.levels[0].forward_passes <= 6


def test_token_types_go_on_as_in_plain_generation(enabled: None) -> None:
    """Rows of different lengths and with different types; a drafter without such an argument is shown none."""
    model = tiny("gpt2")
    inputs = prompts(3)
    types = torch.randint(0, 2, inputs["input_ids"].shape, generator=torch.Generator().manual_seed(1))
    plain = model.generate(**inputs, token_type_ids=types, **LENGTH)
    assert plain.tolist() != model.generate(**inputs, **LENGTH).tolist()
    for chain in ([noisy(model)], [noisy(model, 0.02), noisy(model, 0.05)], [tiny("llama")]):
        assert (
            model.generate(**inputs, token_type_ids=types, **LENGTH, assistant_models=chain).tolist() == plain.tolist()
        )


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_embeddings_with_ids_and_after_a_cache(enabled: None, kind: str) -> None:
    model = tiny(kind)
    ids = prompts(2)["input_ids"]
    embeds = model.get_input_embeddings()(ids).detach().roll(1, dims=1)
    plain = model.generate(input_ids=ids, inputs_embeds=embeds, **LENGTH)
    assert plain.tolist() != model.generate(input_ids=ids, **LENGTH).tolist()
    for chain in ([SuffixDrafter(min_match=1)], [noisy(model)], [noisy(model), tiny("llama", hidden_size=16)]):
        found = model.generate(input_ids=ids, inputs_embeds=embeds, **LENGTH, assistant_models=chain)
        assert found.tolist() == plain.tolist()

    def turn(**more: Any) -> Any:
        first = model.generate(inputs_embeds=embeds, max_new_tokens=4, do_sample=False, return_dict_in_generate=True)
        told = model.get_input_embeddings()(first.sequences).detach()
        given = {"inputs_embeds": torch.cat([embeds, told], dim=1), GENERATION_CACHE: getattr(first, GENERATION_CACHE)}
        return model.generate(**given, **LENGTH, **more)

    for chain in ([SuffixDrafter(min_match=1)], [noisy(model)]):
        assert turn(assistant_models=chain).tolist() == turn().tolist()


def test_embeddings_and_ids_of_different_lengths_are_refused(enabled: None) -> None:
    model = tiny()
    ids = prompts(1)["input_ids"]
    embeds = model.get_input_embeddings()(ids).detach()
    with pytest.raises(ValueError, match="an id for each embedding"):
        model.generate(input_ids=ids[:, :5], inputs_embeds=embeds, **LENGTH, assistant_models=[SuffixDrafter()])


def test_what_is_for_which_pass() -> None:
    given = {"labels": 1, "pixel_values": torch.ones(1), "mm_encoder_outputs": {}, "token_type_ids": torch.ones(1, 3)}
    extras = Extras.of({**given, "image_grid": torch.ones(1)}, torch.zeros(3, 1, 3))
    assert set(extras.by_token) == {"token_type_ids"}
    assert set(extras.first) == {"pixel_values", "mm_encoder_outputs"}
    assert set(extras.always) == {"image_grid"}
    assert extras.positions is not None
    assert extras.marks_prompt
    assert not Extras.of({"mm_encoder_outputs": {}}).marks_prompt
    assert Forwarding(tiny("gpt2")).plain, "ordinary models are called as they always were"
    assert Forwarding(tiny("llama")).plain
    assert not Forwarding(tiny("llama"), extras).plain
