# SPDX-License-Identifier: Apache-2.0
"""Gemma 4's assistants as a level: transformers' own drafts, in batches, under middles, under a seed."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from companion_models import gemma, keyless
from same_seed import check_texts
from tiny_models import noisy, prompts, tiny
from transformers.generation import candidate_generator

import hf_polyspec
from hf_polyspec.bench.measurements.tiny_models import tiny_model
from hf_polyspec.bench.measurements.tiny_pictures import SEEING, pictured
from hf_polyspec.host import ragged_cache
from hf_polyspec.host.modeling import AutoModelForImageTextToText
from hf_polyspec.host.release import GENERATION_CACHE
from hf_polyspec.levels.keyless import KeylessDrafter

NEW, VOCABULARY = 24, 8
Said = list[tuple[list[int], list[int]]]


@pytest.fixture(scope="module", params=["sdpa", "eager"])
def pair(request: pytest.FixtureRequest) -> tuple[Any, Any]:
    """With sdpa each row has its own columns; with eager attention they share a rectangle."""
    return hf_polyspec.attach(gemma(VOCABULARY, attention=request.param)), keyless(VOCABULARY)


def _prompts(batch: int, length: int = 9) -> dict[str, torch.Tensor]:
    return prompts(batch, length, vocabulary=VOCABULARY)


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> Said:
    """Texts, without padding, and what was drafted behind them."""
    propose, found = KeylessDrafter.propose, []

    def noted(self: Any, context: Any, limits: Any, law: Any) -> Any:
        proposal = propose(self, context, limits, law)
        mask = context.prompt.mask
        for row, (ids, tokens) in enumerate(zip(context.ids, proposal.tokens, strict=True)):
            found.append((ids if mask is None else ids[int((mask[row] == 0).sum()) :], tokens))
        return proposal

    monkeypatch.setattr(KeylessDrafter, "propose", noted)
    return found


@torch.no_grad()
def _theirs(model: Any, drafter: Any, text: list[int], count: int) -> list[int]:
    """What transformers' generator drafts of a text whose last token the model has not read."""
    ids = torch.tensor([text])
    config = model._prepare_generation_config(None, max_length=len(text) + 99)[0]
    kind = candidate_generator.SinglePositionMultiTokenCandidateGenerator
    given = {
        "assistant_model": drafter,
        "target_model_input_embeddings": model.get_input_embeddings(),
        "generation_config": config,
    }
    with warnings.catch_warnings():  # older releases want what they call deprecated
        warnings.simplefilter("ignore", FutureWarning)
        generator = kind(**given, input_ids=ids, model_kwargs={})
    generator.num_assistant_tokens = count
    output = model(ids[:, :-1], use_cache=False, output_hidden_states=True, return_shared_kv_states=True)
    found = generator.get_candidates(ids, {}, output, is_first_iteration=False, n_last_matches=0)[0]
    drafted: list[int] = found[0, len(text) :].tolist()
    return drafted


@pytest.mark.parametrize("batch", [1, 3])
def test_drafts_are_transformers_own(pair: tuple[Any, Any], batch: int, said: Said) -> None:
    """Behind every text, through rejections and past the windows of both."""
    model, drafter = pair
    found = model.generate(**_prompts(batch), max_new_tokens=NEW, do_sample=False, assistant_models=[drafter])
    assert torch.equal(found, model.generate(**_prompts(batch), max_new_tokens=NEW, do_sample=False))
    drafts = [(text, tokens) for text, tokens in said if tokens]
    assert len(drafts) > 12
    for text, tokens in drafts[:: 2 * batch - 1]:
        assert tokens == _theirs(model, drafter, text, len(tokens)), text


def test_a_row_whose_window_was_let_go_of(said: Said, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ragged_cache, "_MORE_ROOM", 1)
    monkeypatch.setattr(ragged_cache, "_MARGIN", 1)
    let_go: list[int] = []
    reserve = ragged_cache.Regions.reserve

    def noted(self: Any, row: int, held: int, columns: int) -> Any:
        moved = reserve(self, row, held, columns)
        let_go.append(self.dropped[row])
        return moved

    monkeypatch.setattr(ragged_cache.Regions, "reserve", noted)
    model, drafter = hf_polyspec.attach(gemma(VOCABULARY)), keyless(VOCABULARY)
    model.generate(**_prompts(2, 20), max_new_tokens=20, do_sample=False, assistant_models=[drafter])
    assert max(let_go) > 5
    for text, tokens in [one for one in said if one[1]][-6:]:
        assert tokens == _theirs(model, drafter, text, len(tokens)), text


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("middle", [False, True], ids=["drafter", "under a middle"])
def test_the_text_is_plain_generations(pair: tuple[Any, Any], batch: int, middle: bool) -> None:
    """Under a middle too, which has not read the last token now and then."""
    model, drafter = pair
    check_texts(model, [noisy(model, 0.05), drafter] if middle else [drafter], _prompts(batch), NEW)


def test_other_ways_of_running(pair: tuple[Any, Any], tmp_path: Path) -> None:
    """By a folder's name, with embeddings in an order of their own, options, a cache of the caller's, an engine."""
    model, drafter = pair
    drafter.save_pretrained(tmp_path / "drafter")
    ordered = keyless(VOCABULARY, use_ordered_embeddings=True, num_centroids=4, centroid_intermediate_top_k=2)
    ordered.masked_embedding.token_ordering.copy_(torch.arange(VOCABULARY).flip(0))
    greedy = {"max_new_tokens": 12, "do_sample": False, "return_dict_in_generate": True, **_prompts(1)}
    plain = model.generate(**greedy)
    for one, options in (
        (str(tmp_path / "drafter"), {}),
        (ordered, {}),
        (drafter, {"num_assistant_tokens": 2, "assistant_confidence_threshold": 0.1}),
        (drafter, {"use_cache": False}),
        (drafter, {"prefill_chunk_size": 3}),
    ):
        found = model.generate(**greedy, assistant_models=[one], **options)
        assert found.sequences.tolist() == plain.sequences.tolist()
        assert bool(found.polyspec.levels[1].drafted) == options.get("use_cache", True)
    more = {"input_ids": torch.cat([plain.sequences, torch.tensor([[3]])], 1), "max_new_tokens": 8, "do_sample": False}
    first, second = ({GENERATION_CACHE: model.generate(**greedy)[GENERATION_CACHE]} for _ in range(2))
    found = model.generate(**more, **first, assistant_models=[drafter], return_dict_in_generate=True)
    assert found.sequences.tolist() == model.generate(**more, **second).tolist()
    assert found.polyspec.levels[1].drafted
    batch = [[1, 4, 2, 3], [3, 5, 1, 3, 2, 4, 4], [6, 2]]
    short = {"max_new_tokens": 8, "do_sample": False}
    answers = hf_polyspec.generate_batch(model, batch, slots=2, assistant_models=[drafter], **short)
    for ids, answer in zip(batch, answers.values(), strict=True):
        alone = model.generate(torch.tensor([ids]), **short)
        assert ids + answer.generated_tokens == alone[0].tolist()


@pytest.mark.parametrize("rows", [1, 2])
def test_behind_pictures(enabled: None, rows: int) -> None:
    """The pictures' keys are the level above's, and so read as all others."""
    model: Any = tiny_model("gemma4", AutoModelForImageTextToText, SEEING.get("gemma4"))
    layers = model.config.get_text_config().per_layer_config
    drafter = keyless(
        model.get_input_embeddings().num_embeddings,
        head_dim=layers[0].head_dim,
        global_head_dim=layers[1].head_dim,
        num_key_value_heads=layers[0].num_key_value_heads,
        num_global_key_value_heads=layers[1].num_key_value_heads,
    )
    asked = {**pictured(model, rows), "max_new_tokens": 12, "do_sample": False, "return_dict_in_generate": True}
    for levels in ([drafter], [noisy(model, 0.02), drafter]):
        found = model.generate(**asked, assistant_models=levels)
        assert found.sequences.tolist() == model.generate(**asked).sequences.tolist()
        assert found.polyspec.levels[-1].drafted


def test_refusals(pair: tuple[Any, Any]) -> None:
    model, drafter = pair
    asked = {"max_new_tokens": 4, "do_sample": False, **_prompts(1)}
    with pytest.raises(ValueError, match="only drafts and cannot check what"):
        model.generate(**asked, assistant_models=[drafter, noisy(model)])
    with pytest.raises(ValueError, match=r"\(Gemma4AssistantForCausalLM\) .* has another tokenizer than"):
        model.generate(**asked, assistant_models=[keyless(4 * VOCABULARY)])
    with pytest.raises(ValueError, match="that \\(LlamaForCausalLM\\) does not hand out its keys and values"):
        hf_polyspec.generate(tiny("llama", vocab_size=VOCABULARY), **asked, assistant_models=[drafter])
    with pytest.raises(ValueError, match="hidden states of width 48, and those of the level above it are 32 wide"):
        model.generate(**asked, assistant_models=[keyless(VOCABULARY, backbone=48)])
    with pytest.raises(ValueError, match=r"assistant_models\[0\] .* cannot read the keys and values of that \(Gemma4"):
        model.generate(**asked, assistant_models=[keyless(VOCABULARY, num_key_value_heads=4)])
