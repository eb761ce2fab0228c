# SPDX-License-Identifier: Apache-2.0
"""Block-diffusion drafters as a level: transformers' own drafts, in batches, under middles, under a seed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from companion_models import AuthorsForm, dflash
from same_seed import check_texts
from tiny_models import head_for, noisy, prompts, tiny
from torch import nn
from transformers import GenerationConfig
from transformers.generation import candidate_generator

import hf_polyspec
from hf_polyspec.generation.candidates import PolySpecCandidateGenerator
from hf_polyspec.host.dflash import DFlash
from hf_polyspec.levels.dflash import DFlashDrafter
from hf_polyspec.planning import Wish, make_plan

NEW, VOCABULARY = 24, 8


@pytest.fixture(scope="module")
def pair() -> tuple[Any, Any]:
    return hf_polyspec.attach(tiny("llama", vocab_size=VOCABULARY)), dflash(VOCABULARY)


def _prompts(batch: int) -> dict[str, torch.Tensor]:
    return prompts(batch, vocabulary=VOCABULARY)


def test_drafts_are_transformers_own(pair: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Round by round, through rejections and past the drafter's window, the same tokens after the same texts."""
    model, drafter = pair
    theirs: list[tuple[int, list[int]]] = []
    ours: list[tuple[int, list[int]]] = []
    own, propose = candidate_generator.DFlashTokenCandidateGenerator, DFlashDrafter.propose
    get_candidates = own.get_candidates

    def noted(self: Any, input_ids: Any, *args: Any, **kwargs: Any) -> Any:
        found = get_candidates(self, input_ids, *args, **kwargs)
        theirs.append((input_ids.shape[1], found[0][0, input_ids.shape[1] :].tolist()))
        return found

    def noted_too(self: Any, context: Any, limits: Any, law: Any) -> Any:
        proposal = propose(self, context, limits, law)
        ours.append((len(context.ids[0]), proposal.tokens[0]))
        return proposal

    monkeypatch.setattr(own, "get_candidates", noted)
    monkeypatch.setattr(DFlashDrafter, "propose", noted_too)
    greedy = {**_prompts(1), "max_new_tokens": NEW, "do_sample": False}
    plain = model.generate(**greedy, assistant_model=drafter, speculation_type="dflash")
    found = model.generate(**greedy, assistant_models=[drafter])
    assert torch.equal(found, plain)
    last = plain.shape[1] - 5  # where the length leaves no room, each cuts in its own way
    wanted = [(length, tokens) for length, tokens in theirs if length < last and tokens]
    assert [(length, tokens) for length, tokens in ours if length < last and tokens] == wanted
    assert len(wanted) > 5


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("middle", [False, True], ids=["drafter", "under a middle"])
def test_the_text_is_plain_generations(pair: tuple[Any, Any], batch: int, middle: bool) -> None:
    """Under a middle too, which has not read the last token now and then."""
    model, drafter = pair
    check_texts(model, [noisy(model, 0.05), drafter] if middle else [drafter], _prompts(batch), NEW)


def test_a_drafter_that_is_right_is_believed(pair: tuple[Any, Any]) -> None:
    """Where all of the block is what the model says, a pass brings a block."""
    drafter = pair[1]
    same = hf_polyspec.attach(tiny("llama", vocab_size=VOCABULARY))
    with torch.no_grad():
        same.lm_head.weight.zero_()
    greedy = {"max_new_tokens": NEW, "do_sample": False, "return_dict_in_generate": True, **_prompts(3)}
    for length, tokens in ((None, 5), (2, 3), (9, 5)):
        found = same.generate(**greedy, assistant_models=[drafter], num_assistant_tokens=length)
        assert found.polyspec.levels[0].forward_passes <= 2 + NEW / tokens
        assert found.polyspec.levels[0].drafted_at[tokens - 1 :] == []


def test_the_norm_that_an_embedding_ends_with_is_left_out() -> None:
    class Normed(nn.Embedding):
        def __init__(self, like: nn.Embedding) -> None:
            super().__init__(*like.weight.shape)
            self.weight = like.weight
            self.embed_norm = nn.LayerNorm(like.weight.shape[1])

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            found: torch.Tensor = self.embed_norm(super().forward(ids))
            return found

    model = tiny("llama", vocab_size=VOCABULARY)
    embedding = Normed(model.get_input_embeddings())
    model.set_input_embeddings(embedding)
    found = DFlash(dflash(VOCABULARY), model)._embedded([1, 2, 7])
    assert torch.equal(found[0], embedding.weight[[1, 2, 7]])
    assert not torch.equal(found, embedding(torch.tensor([[1, 2, 7]])))


def test_drafters_that_bring_code_of_their_own(pair: tuple[Any, Any], tmp_path: Path) -> None:
    """The same weights called in the authors' way draft the same; such code in a folder is not run."""
    model = pair[0]
    drafter = dflash(VOCABULARY, layer_types=["full_attention"] * 2)
    greedy = {"max_new_tokens": NEW, "do_sample": False, "return_dict_in_generate": True, **_prompts(2)}
    ours, theirs = (model.generate(**greedy, assistant_models=[one]) for one in (drafter, AuthorsForm(drafter)))
    assert ours.sequences.tolist() == theirs.sequences.tolist() == model.generate(**greedy).sequences.tolist()
    counts = [(one.polyspec.levels[1].drafted, one.polyspec.levels[1].accepted) for one in (ours, theirs)]
    assert counts[0] == counts[1]
    assert counts[0][1] > 0
    config = {"model_type": "qwen3", "auto_map": {"AutoModel": "drafter.Drafter"}, "block_size": 4, "dflash_config": {}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="brings Python code of its own"):
        model.generate(**greedy, assistant_models=[str(tmp_path)])


def test_by_name_from_a_folder(pair: tuple[Any, Any], tmp_path: Path) -> None:
    model, drafter = pair
    drafter.save_pretrained(tmp_path / "drafter")
    greedy = {"max_new_tokens": 8, "do_sample": False, "return_dict_in_generate": True, **_prompts(1)}
    named, given = (model.generate(**greedy, assistant_models=[one]) for one in (str(tmp_path / "drafter"), drafter))
    assert named.sequences.tolist() == given.sequences.tolist()
    assert named.polyspec.levels[1].name == "drafter"
    assert named.polyspec.levels[1].drafted == given.polyspec.levels[1].drafted > 0


def test_other_doors(pair: tuple[Any, Any]) -> None:
    """The planner records it as it does a head; transformers' loop shows it no hidden states, unless under a middle."""
    model, drafter = pair
    wish = Wish(new_tokens=8, repeats=1, draft_seconds=0.2, batches=False)
    found = make_plan(model, [drafter], [_prompts(1)["input_ids"][0].tolist()], wish, names=["target", "drafter"])
    assert found.measured.drafts[0, 1, None].blind_first
    config = GenerationConfig(max_length=30, polyspec_verification="token")
    with pytest.raises(
        ValueError, match=r"\(Muse.*\) reads the hidden states of the level above it; here it needs a mo"
    ):
        PolySpecCandidateGenerator(model, [drafter], config)
    generator = PolySpecCandidateGenerator(model, [noisy(model), drafter], config)
    assert generator.get_candidates(torch.tensor([[3, 4, 5]]))[0].shape[1] > 4


def test_refusals(pair: tuple[Any, Any]) -> None:
    model, drafter = pair
    asked = {"max_new_tokens": 4, "do_sample": False, **_prompts(1)}
    with pytest.raises(ValueError, match="only drafts and cannot check what"):
        model.generate(**asked, assistant_models=[drafter, noisy(model)])
    with pytest.raises(ValueError, match=r"speculation_type='dflash' .* \(put the drafter itself into assistant_mod"):
        model.generate(**asked, speculation_type="dflash", assistant_models=["suffix"])
    with pytest.raises(ValueError, match=r"assistant_models\[1\] .* that is no causal language model"):
        model.generate(**asked, assistant_models=[head_for(model, "eagle1"), drafter])
    reasons = {
        "hidden states of width 16, and those of the level above it are 32": {"hidden_size": 16},
        r"reads the layers \[0, 9\] of a model, and the level above it has 2": {"target_layer_ids": [0, 9]},
        "mask_token_id is 99, and the level above it embeds 8 ids": {"mask_token_id": 99},
        "block_size is 1": {"block_size": 1},
    }
    for reason, settings in reasons.items():
        with pytest.raises(ValueError, match=rf"assistant_models\[0\] \(MuseGlimmerAssistantModel\) .*{reason}"):
            model.generate(**asked, assistant_models=[dflash(VOCABULARY, **settings)])
