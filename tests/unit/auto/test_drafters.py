# SPDX-License-Identifier: Apache-2.0
"""Heads that lie on this disk are tried by "auto", and taken where they promise most."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from mtp_models import with_mtp
from safetensors.torch import load_file, save_file
from tiny_models import head_for, noisy, prompts, tiny
from transformers import AutoModelForCausalLM, PreTrainedModel

import hf_polyspec
from hf_polyspec.auto import choosing, drafters, profile
from hf_polyspec.auto.drafters import drafters_here, load_drafter, promise
from hf_polyspec.control.costs import STEPS, Head, Trial
from hf_polyspec.exactness.proposal import Proposal
from hf_polyspec.generation import automatic, trial
from hf_polyspec.generation.trial import tried
from hf_polyspec.host.hub_cache import cached_folders
from hf_polyspec.levels.eagle import EagleDrafter
from hf_polyspec.levels.suffix import SuffixDrafter
from hf_polyspec.planning.theory.cost_model import SecondsTable

GREEDY: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False, "return_dict_in_generate": True}


@pytest.fixture
def folder(model: PreTrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Of a head for the model, in the hub's cache, beside one that does not fit and a repository without a config."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    place = tmp_path / "hub" / "models--some--head" / "snapshots" / "1a2b"
    head_for(model).save_pretrained(place)
    wide = tiny("llama", hidden_size=64)
    head_for(wide).save_pretrained(tmp_path / "hub" / "models--some--other" / "snapshots" / "3c")
    (tmp_path / "hub" / "models--some--rest" / "snapshots" / "4d").mkdir(parents=True)
    return str(place)


@pytest.fixture
def trials(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Instead of running drafters, what the test says of them; and how often it was asked."""
    told: dict[str, Any] = {"share": 0.95, "seconds": 1e-5, "asked": 0}

    def says(*_: Any) -> Trial:
        told["asked"] += 1
        return Trial(told["share"], told["seconds"])

    monkeypatch.setattr(automatic, "tried", says)
    return told


def run(model: Any, batch: int = 1, **options: Any) -> Any:
    return model.generate(**{**prompts(batch), **GREEDY, "assistant_models": "auto", **options})


def levels(output: Any) -> list[str]:
    return [level.name for level in output.polyspec.levels[1:]]


@pytest.mark.parametrize("batch", [1, 3])
def test_a_head_that_promises_most_is_taken(
    model: PreTrainedModel, timed: list[Any], trials: dict[str, Any], folder: str, batch: int
) -> None:
    ours = run(model, batch)
    assert ours.sequences.tolist() == run(model, batch, assistant_models=None).sequences.tolist()
    assert len(levels(ours)) == 2
    assert levels(ours)[-1] == "suffix"
    assert "int8" not in levels(ours)[0]
    assert "95% of its tokens should be right" in ours.polyspec.chosen
    ((_, kept),) = profile.kept()
    assert kept is not None
    assert kept.members == (folder, "suffix")
    assert kept.options == {"num_assistant_tokens": max(STEPS)}
    assert kept.passes[folder] == [[1, 1e-5], [2, 2e-5]]
    assert any(sentence.endswith("which promises less") for sentence in kept.left_out)
    choosing._sides.clear()  # as another process
    assert levels(run(model, batch)) == levels(ours)
    assert trials["asked"] == 1
    sampled = {"do_sample": True, "polyspec_seed": 3}
    assert run(model, **sampled).sequences.tolist() == run(model, assistant_models=[], **sampled).sequences.tolist()


@pytest.mark.parametrize(
    ("share", "seconds", "words"),
    [(0.1, 5e-4, "which would not pay"), (0.5, 4e-4, "int8 promises as much without it")],
)
def test_a_head_that_promises_less_is_left_out_and_said(
    model: PreTrainedModel,
    timed: list[Any],
    trials: dict[str, Any],
    folder: str,
    share: float,
    seconds: float,
    words: str,
) -> None:
    trials["share"], trials["seconds"] = share, seconds
    assert [name.split()[-1] for name in levels(run(model))] == ["int8", "suffix"]
    ((_, kept),) = profile.kept()
    assert kept is not None
    assert [sentence for sentence in kept.left_out if words in sentence]


@pytest.mark.parametrize("batch", [1, 2])
def test_a_head_and_a_copy_that_both_pay_are_both_taken(
    model: PreTrainedModel, timed: list[Any], trials: dict[str, Any], folder: str, batch: int
) -> None:
    """A head that is not always right and takes a while drafts for the copy: three levels, each with its own size."""
    trials["share"], trials["seconds"] = 0.7, 1e-4
    ours = run(model, batch)
    assert ours.sequences.tolist() == run(model, batch, assistant_models=None).sequences.tolist()
    assert [name.split()[-1] for name in levels(ours)] == ["int8", levels(ours)[1], "suffix"]
    ((_, kept),) = profile.kept()
    assert kept is not None
    assert kept.members == ("int8", folder, "suffix")
    assert not kept.left_out
    choosing._sides.clear()  # as another process
    again = run(model, batch)
    assert levels(again) == levels(ours)
    assert trials["asked"] == 1
    costs = next(iter(choosing._sides[model].costs.values()))
    assert costs.head is not None
    assert len(costs.tables) == 2
    sampled = {"do_sample": True, "polyspec_seed": 3}
    assert run(model, **sampled).sequences.tolist() == run(model, assistant_models=[], **sampled).sequences.tolist()


def test_a_head_whose_folder_has_gone_is_gone_without(
    model: PreTrainedModel, timed: list[Any], trials: dict[str, Any], folder: str
) -> None:
    run(model)
    choosing._sides.clear()
    (Path(folder) / "config.json").unlink()
    found = run(model)
    assert levels(found) == ["suffix"]
    assert f"this call goes without {folder}" in found.polyspec.chosen


def test_an_engine_takes_it_too(model: PreTrainedModel, timed: list[Any], trials: dict[str, Any], folder: str) -> None:
    run(model)
    with hf_polyspec.Engine(model, "auto") as engine:
        assert [type(one).__name__ for one in engine._crew.held.levels] == ["EagleHead", "SuffixDrafter"]


def test_nothing_but_what_fits_is_found(model: PreTrainedModel, folder: str, tmp_path: Path) -> None:
    assert list(drafters_here(model)) == [folder]
    model.save_pretrained(tmp_path / "model")
    model.config.name_or_path = str(tmp_path / "model")
    assert list(drafters_here(model)) == [folder, "mtp"]
    assert len(cached_folders()) == 2


def store_with_layer(model: PreTrainedModel, place: Path) -> Path:
    """A checkpoint in two files with a multi-token-prediction layer in the second, which is handed back."""
    model.save_pretrained(place)
    whole = place / "model.safetensors"
    own, width = load_file(whole), int(model.config.hidden_size)
    layer = {
        name.replace(".layers.1.", ".layers.2."): weight.clone() for name, weight in own.items() if ".layers.1." in name
    }
    for name in ("enorm", "hnorm", "shared_head.norm"):
        layer[f"model.layers.2.{name}.weight"] = torch.ones(width)
    layer["model.layers.2.eh_proj.weight"] = torch.full((width, 2 * width), 0.1)
    files = {"model-1.safetensors": own, "model-2.safetensors": layer}
    for file, tensors in files.items():
        save_file(tensors, place / file, metadata={"format": "pt"})
    where = {name: file for file, tensors in files.items() for name in tensors}
    (place / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    whole.unlink()
    return place / "model-2.safetensors"


@pytest.mark.parametrize("told", [False, True])
def test_the_layers_of_a_checkpoint_in_the_hubs_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, told: bool
) -> None:
    """Of a model that was loaded by its id: from this disk alone, and only where nothing of it is missing."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("somebody was asked"))
    repository = tmp_path / "hub" / "models--some--model"
    last = store_with_layer(with_mtp("glm4_moe", 1)[0], repository / "snapshots" / "5e6f")
    model = AutoModelForCausalLM.from_pretrained(last.parent)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("5e6f")
    model.config.name_or_path = "some/model"
    model.config.num_mtp_layers = int(told)
    assert list(drafters_here(model)) == ["mtp"]
    drafter = load_drafter("mtp", model)
    assert drafter.layers.count == 1
    assert torch.equal(drafter.layers.model.layers[0].eh_proj.weight, torch.full((32, 64), 0.1))
    (repository / "refs" / "main").unlink()
    assert not list(drafters_here(model))
    model.config._commit_hash = "5e6f"
    assert list(drafters_here(model)) == ["mtp"]
    last.unlink()
    assert not list(drafters_here(model))
    model.config.name_or_path = "no id of a model"
    assert not list(drafters_here(model))


def test_the_head_that_ships_fits_its_model() -> None:
    told = json.loads((drafters.head_folder() / "config.json").read_text())
    target = tiny("llama", hidden_size=576, vocab_size=told["draft_vocab_size"], num_hidden_layers=30)
    assert next(drafters_here(target)) == drafters.HEAD


def test_a_trial_counts_what_is_right(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    state = torch.get_rng_state()
    ids = prompts(1)["input_ids"][0].tolist()
    monkeypatch.setattr(trial, "USUAL_TOKENS", 1e-9)
    monkeypatch.setattr(trial, "SURE", 99)  # every round counts
    found = tried(model, noisy(model, 0.0), ids)
    assert found.share == pytest.approx(1.0)
    assert found.whole is not None
    assert 0 < trial.TOKENS * found.step < found.whole[1]
    assert tried(model, noisy(model, 3.0), [3]).share < 0.7
    assert 0 <= tried(model, head_for(model), ids).share < 1
    assert torch.equal(torch.get_rng_state(), state)


def test_what_a_suffix_drafter_finds_is_no_merit_of_a_head(
    model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a text that repeats itself nothing counts, and what is expected stays what is usual."""
    monkeypatch.setattr(SuffixDrafter, "propose", lambda self, context, *_: Proposal([[1, 2]], None, [[2, 2]]))
    assert tried(model, noisy(model, 0.0), [3, 4, 5]).share == pytest.approx(trial.USUAL)
    monkeypatch.undo()
    few = tried(model, noisy(model, 0.0), [3, 4, 5]).share
    assert trial.USUAL < few < 1


def test_what_a_drafter_promises() -> None:
    flat = [[1, 1.0], [8, 1.0]]
    assert promise(flat, Head(1.0, 0.0)) == max(STEPS) + 1
    assert promise(flat, Head(0.0, 0.5)) == 1
    assert promise(flat, Head(0.6, 0.2)) == pytest.approx((1 + 0.6 + 0.36) / 1.4)
    assert promise(flat, Head(0.6, 0.4)) == pytest.approx(1.6 / 1.4)
    assert promise(flat, Head(0.6, 0.2, 0.3)) == pytest.approx((1 + 0.6 + 0.36) / 1.7)
    assert promise(flat, Head(0.6, 0.2, 2.0)) == 1


def test_what_a_head_makes_a_model_do_counts() -> None:
    """A round took longer than the pass and the steps: hidden states were shown, guesses looked up."""
    table = SecondsTable(((1, 1.0), (8, 1.0)))
    assert Trial(0.6, 0.1, (3, 1.7)).head(table) == Head(0.6, 0.1, pytest.approx(0.4))
    assert Trial(0.6, 0.1, (3, 1.1)).head(table) == Head(0.6, 0.1, 0.0)
    assert Trial(0.6, 0.1).head(table) == Head(0.6, 0.1)
    again = profile.head_of(0.6, profile.drafts_of(Head(0.6, 0.1, 0.4)))
    assert again == Head(0.6, pytest.approx(0.1), pytest.approx(0.4))


def test_the_level_is_the_drafter_that_was_tried(
    model: PreTrainedModel, timed: list[Any], trials: dict[str, Any], folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    genuine = EagleDrafter.propose
    monkeypatch.setattr(EagleDrafter, "propose", lambda self, *given: (asked.append(1), genuine(self, *given))[1])
    run(model, polyspec_control="fixed")
    assert asked


@pytest.mark.parametrize("packs", [True, False])
def test_a_head_is_tried_as_it_will_run(
    model: PreTrainedModel,
    timed: list[Any],
    trials: dict[str, Any],
    folder: str,
    packs: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What packing makes of its steps is part of what they cost."""
    seen: list[list[bool]] = []
    genuine = drafters.try_drafters

    def watched(model: Any, target: Any, prompt: Any, passes: Any, tries: Any, *more: Any) -> Any:
        def looked_at(target: Any, member: Any, ids: Any) -> Any:
            linears = [module for module in member.layers.modules() if isinstance(module, torch.nn.Linear)]
            seen.append(["forward" in linear.__dict__ for linear in linears])
            return tries(target, member, ids)

        return genuine(model, target, prompt, passes, looked_at, *more)

    monkeypatch.setattr(choosing, "try_drafters", watched)
    run(model, polyspec_pack=packs)
    assert seen == [[packs] * len(seen[0])]
