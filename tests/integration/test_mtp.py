# SPDX-License-Identifier: Apache-2.0
"""Multi-token-prediction layers as a level: transformers' own drafts, in batches, under middles, under a seed."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from mtp_models import SIZES, with_mtp
from same_seed import check
from tiny_models import noisy, prompts, tiny
from transformers import modeling_layers
from transformers.generation import candidate_generator

import hf_polyspec
from hf_polyspec.host.mtp import MtpLayers, mtp_layers
from hf_polyspec.levels.mtp import MtpDrafter

NEW = 24


@pytest.fixture(scope="module", params=[(family, layers) for family in SIZES for layers in (1, 3)], ids=str)
def pair(request: pytest.FixtureRequest) -> tuple[Any, Any]:
    model, layers = with_mtp(*request.param)
    return hf_polyspec.attach(model), layers


class Recorded(MtpDrafter):
    """Notes what it was asked to continue and what it proposed."""

    def __init__(self, layers: MtpLayers) -> None:
        super().__init__(layers)
        self.said: list[tuple[int, list[int]]] = []

    def propose(self, context: Any, limits: list[int], law: Any) -> Any:
        proposal = super().propose(context, limits, law)
        if proposal.tokens[0]:
            self.said.append((len(context.ids[0]), proposal.tokens[0]))
        return proposal


def test_drafts_are_transformers_own(pair: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Round by round, through rejections, the same tokens after the same texts."""
    model, layers = pair
    said: list[tuple[int, list[int]]] = []
    own = candidate_generator.MTPCandidateGenerator
    get_candidates = own.get_candidates

    def noted(self: Any, input_ids: Any, *args: Any, **kwargs: Any) -> Any:
        found = get_candidates(self, input_ids, *args, **kwargs)
        if found[0].shape[1] > input_ids.shape[1]:
            said.append((input_ids.shape[1], found[0][0, input_ids.shape[1] :].tolist()))
        return found

    monkeypatch.setattr(own, "get_candidates", noted)
    monkeypatch.setattr(modeling_layers.MtpModel, "from_pretrained", lambda *args, **kwargs: layers)
    ids = prompts(1)["input_ids"]
    plain = model.generate(ids, max_new_tokens=NEW, do_sample=False, use_mtp=True)
    drafter = Recorded(MtpLayers(layers))
    found = model.generate(ids, max_new_tokens=NEW, do_sample=False, assistant_models=[drafter])
    assert torch.equal(found, plain)
    wanted = [(length, tokens) for length, tokens in said if length < ids.shape[1] + NEW - 4]
    assert [one for one in drafter.said if one[0] < ids.shape[1] + NEW - 4] == wanted
    assert len(wanted) > 3


@pytest.mark.parametrize("batch", [1, 3])
def test_the_text_is_plain_generations(pair: tuple[Any, Any], batch: int) -> None:
    """As drafter and under a middle, which has not read the last tokens now and then."""
    model, layers = pair
    for levels in ([MtpDrafter(MtpLayers(layers))], [noisy(model, 0.05), MtpDrafter(MtpLayers(layers))]):
        greedy = {"max_new_tokens": NEW, "do_sample": False, **prompts(batch)}
        assert torch.equal(model.generate(**greedy, assistant_models=levels), model.generate(**greedy))
        for seed in (1, 3):
            statistics = check(model, levels, seed, **prompts(batch), temperature=0.7, eos_token_id=[5, 6])
            assert statistics.levels[-1].drafted


def test_layers_of_a_model_that_repeats_are_right(pair: tuple[Any, Any]) -> None:
    """Where the layers say what the model says, all drafts are accepted: two or four tokens a pass."""
    model, layers = pair
    same = copy.deepcopy(model)
    made = copy.deepcopy(layers)
    with torch.no_grad():  # whatever they are given, model and layers say the same id
        for head in (same.lm_head, made.shared_head):
            head.weight.zero_()
    greedy = {"max_new_tokens": NEW, "do_sample": False, "return_dict_in_generate": True, **prompts(3)}
    found = hf_polyspec.generate(same, **greedy, assistant_models=[MtpDrafter(MtpLayers(made))])
    count = len(made.layers)
    assert found.polyspec.levels[0].forward_passes <= 2 + NEW / (count + 1)


def test_a_layer_alone_on_releases_that_only_run_them_all(
    pair: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What stands in for `forward_layer` there says the same, from an empty cache and from one that was cut."""
    _, made = pair
    made = copy.deepcopy(made)
    made.use_shared_post_norm, made.shared_post_norm = True, copy.deepcopy(made.layers[0].hnorm)
    with torch.no_grad():
        made.shared_post_norm.weight.mul_(0.5)
    hidden = torch.randn(6, made.config.hidden_size, generator=torch.Generator().manual_seed(0))

    def said() -> list[torch.Tensor]:
        layers, found = MtpLayers(made), []
        cache = layers.new_cache()
        with torch.no_grad():
            for layer in range(layers.count):
                found.append(layers.step(layer, hidden, [3, 1, 4, 1, 5, 9], layer + 1, cache))
            for layer in range(layers.count):
                layers.shrink(cache, layer, 4)
                found.append(layers.step(layer, hidden[:2], [2, 6], layer + 5, cache))
        return found

    here = said()
    monkeypatch.delattr(modeling_layers.MtpModel, "forward_layer", raising=False)
    assert all(torch.equal(a, b) for a, b in zip(here, said(), strict=True))


def test_by_name_from_the_models_own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, layers = with_mtp("glm4_moe", 1)
    monkeypatch.setattr(modeling_layers.MtpModel, "from_pretrained", lambda *args, **kwargs: layers)
    greedy = {"max_new_tokens": 8, "do_sample": False, "return_dict_in_generate": True, **prompts(1)}
    found = hf_polyspec.generate(model, **greedy, assistant_models=["int8", "mtp"])
    assert found.sequences.tolist() == model.generate(**greedy).sequences.tolist()
    assert [level.name for level in found.polyspec.levels[2:]] == ["mtp"]
    assert mtp_layers(model).model is mtp_layers(model).model


def test_refusals() -> None:
    model, layers = with_mtp("glm4_moe", 1)
    asked = {"max_new_tokens": 4, "do_sample": False, **prompts(1)}
    with pytest.raises(ValueError, match="'mtp', and LlamaForCausalLM has no multi-token-prediction layers"):
        hf_polyspec.generate(tiny("llama"), **asked, assistant_models=["mtp"])
    with pytest.raises(ValueError, match=r"multi-token-prediction layers of Glm4Moe.* could not be loaded from ''"):
        hf_polyspec.generate(model, **asked, assistant_models=["mtp"])
    with pytest.raises(ValueError, match=r'use_mtp=True .* \(put "mtp" into assistant_models instead\)'):
        hf_polyspec.generate(model, **asked, use_mtp=True, assistant_models=["suffix"])
    with pytest.raises(ValueError, match="mtp only drafts"):
        hf_polyspec.generate(model, **asked, assistant_models=["mtp", "suffix"])
    other = tiny("llama", hidden_size=16, num_attention_heads=2)
    with pytest.raises(ValueError, match="mtp reads hidden states of width 32, and the level above it has 16"):
        hf_polyspec.generate(other, **asked, assistant_models=[MtpDrafter(MtpLayers(layers))])
