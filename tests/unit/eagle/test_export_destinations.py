# SPDX-License-Identifier: Apache-2.0
"""A head for another program holds what that program cannot take from the target, names the target, and no more."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import tiny
from transformers import PreTrainedModel

from hf_polyspec.eagle import EagleHead, bind, export_head, export_speculators, init_for
from hf_polyspec.eagle.formats.export import DESTINATIONS, needs_rows

HEADS: dict[str, tuple[str, dict[str, Any]]] = {
    "eagle1": ("eagle1", {}),
    "eagle3, the target's rows": ("eagle3", {"own_lm_head": False}),
    "eagle3, some of the target's rows": ("eagle3", {"own_lm_head": False, "draft_vocab": list(range(0, 48, 3))}),
    "eagle3, its own rows": ("eagle3", {"own_lm_head": True}),
}


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedModel:
    """A target of eight layers that was loaded by name."""
    folder = tmp_path_factory.mktemp("target")
    tiny("llama", num_hidden_layers=8).save_pretrained(folder)
    model: PreTrainedModel = tiny("llama", num_hidden_layers=8).from_pretrained(folder)
    return model.eval()


def trained(target: PreTrainedModel, kind: str) -> EagleHead:
    algorithm, how = HEADS[kind]
    torch.manual_seed(0)
    head = init_for(target, algorithm, **how).eval()
    with torch.no_grad():
        for weight in head.parameters():
            weight.add_(torch.randn_like(weight) * 0.1)
    return head


@torch.no_grad()
def scores(head: EagleHead, target: PreTrainedModel) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(0, 48, (1, 7), generator=generator)
    features = torch.randn(1, 7, head.config.feature_size, generator=generator)
    logits: torch.Tensor = bind(head, target)(tokens, features).logits
    return logits


def stored(folder: Path) -> set[str]:
    return set(load_file(folder / "model.safetensors"))


@pytest.mark.parametrize("to", list(DESTINATIONS))
@pytest.mark.parametrize("kind", list(HEADS))
def test_what_was_written_scores_like_the_head(target: PreTrainedModel, tmp_path: Path, kind: str, to: str) -> None:
    head = trained(target, kind)
    wanted = scores(head, target)
    head.save_pretrained(tmp_path / "own")
    loaded = EagleHead.from_pretrained(tmp_path / "own")
    out = export_head(loaded, tmp_path / "out", to, target=target)
    assert not loaded.is_bound or loaded.config.own_lm_head  # the caller's head is not bound on the way
    assert loaded.borrowed.embed_tokens is None
    torch.testing.assert_close(scores(EagleHead.from_pretrained(out), target), wanted, rtol=1e-5, atol=1e-5)


HOLDS = {
    ("eagle1", "vllm"): set(),
    ("eagle1", "sglang"): set(),
    ("eagle1", "eagle"): {"embed_tokens.weight"},
    ("eagle1", "speculators"): set(),
    ("eagle3, the target's rows", "vllm"): set(),
    ("eagle3, the target's rows", "sglang"): set(),
    ("eagle3, the target's rows", "eagle"): {"lm_head.weight"},
    ("eagle3, the target's rows", "speculators"): {"embed_tokens.weight", "lm_head.weight"},
    ("eagle3, some of the target's rows", "vllm"): {"lm_head.weight"},
    ("eagle3, some of the target's rows", "sglang"): {"lm_head.weight"},
    ("eagle3, its own rows", "vllm"): {"lm_head.weight"},
    ("eagle3, its own rows", "eagle"): {"lm_head.weight"},
}


@pytest.mark.parametrize(("kind", "to"), list(HOLDS))
def test_the_targets_tensors_are_in_the_file_only_where_nobody_shares_them(
    target: PreTrainedModel, tmp_path: Path, kind: str, to: str
) -> None:
    head = trained(target, kind)
    # vLLM takes an EAGLE-1 embedding where there is one, and the official files have it
    expected = HOLDS[kind, to] | ({"embed_tokens.weight"} if (kind, to) == ("eagle1", "vllm") else set())
    assert stored(export_head(head, tmp_path, to)) & {"embed_tokens.weight", "lm_head.weight"} == expected
    rows = 16 if kind.startswith("eagle3, some") else 48
    if "lm_head.weight" in expected:
        assert load_file(tmp_path / "model.safetensors")["lm_head.weight"].shape[0] == rows


@pytest.mark.parametrize("to", list(DESTINATIONS))
@pytest.mark.parametrize("kind", list(HEADS))
def test_needs_rows_tells_what_a_head_alone_cannot_give(
    target: PreTrainedModel, tmp_path: Path, kind: str, to: str
) -> None:
    trained(target, kind).save_pretrained(tmp_path / "own")
    head = EagleHead.from_pretrained(tmp_path / "own")
    if needs_rows(head.config, to):
        with pytest.raises(ValueError, match="must hold its target's"):
            export_head(head, tmp_path / "out", to, verifier="org/name")
        assert not (tmp_path / "out").exists()
    else:
        export_head(head, tmp_path / "out", to, verifier="org/name")


def test_the_verifier_is_named_as_readers_insist(target: PreTrainedModel, tmp_path: Path) -> None:
    head = trained(target, "eagle3, the target's rows")

    def named(folder: Path) -> Any:
        return json.loads((folder / "config.json").read_text())["speculators_config"]["verifier"]

    found = named(export_head(head, tmp_path / "bound", "vllm"))
    assert found == {"name_or_path": str(Path(target.name_or_path)), "architectures": ["LlamaForCausalLM"]}
    assert Path(found["name_or_path"]).is_absolute()
    found = named(export_head(head, tmp_path / "told", "vllm", verifier="org/name"))
    assert found == {"name_or_path": "org/name", "architectures": ["LlamaForCausalLM"]}
    nameless = tiny("llama", num_hidden_layers=8)
    for made in (bind(head, nameless), EagleHead(head.config)):
        with pytest.raises(ValueError, match="give verifier"):
            export_head(made, tmp_path / "other", "vllm")
        with pytest.raises(ValueError, match="give verifier"):
            export_speculators(made, tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_relative_folders_are_named_from_the_root(
    target: PreTrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(Path(target.name_or_path).parent)
    head = trained(target, "eagle3, the target's rows")
    out = export_head(head, tmp_path, "vllm", verifier=Path(target.name_or_path).name)
    written = json.loads((out / "config.json").read_text())["speculators_config"]["verifier"]["name_or_path"]
    assert written == str(Path(target.name_or_path))


def test_the_layouts_are_those_that_each_reads(target: PreTrainedModel, tmp_path: Path) -> None:
    layouts = {}
    for kind in ("eagle1", "eagle3, its own rows"):
        for to in DESTINATIONS:
            folder = export_head(trained(target, kind), tmp_path / kind / to, to)
            config = json.loads((folder / "config.json").read_text())
            layouts[kind[:6], to] = (config.get("speculators_model_type"), *config["architectures"])
    assert layouts == {
        ("eagle1", "vllm"): (None, "LlamaForCausalLM"),
        ("eagle1", "sglang"): (None, "LlamaForCausalLMEagle"),
        ("eagle1", "eagle"): (None, "LlamaForCausalLM"),
        ("eagle1", "speculators"): ("eagle", "EagleSpeculator"),
        ("eagle3", "vllm"): ("eagle3", "Eagle3DraftModel"),
        ("eagle3", "sglang"): (None, "LlamaForCausalLMEagle3"),
        ("eagle3", "eagle"): (None, "LlamaForCausalLMEagle3"),
        ("eagle3", "speculators"): ("eagle3", "Eagle3DraftModel"),
    }


def test_a_head_of_the_last_state_alone_goes_to_vllm_in_the_official_layout(
    target: PreTrainedModel, tmp_path: Path
) -> None:
    head = init_for(target, "eagle3", has_fc=False, feature_layer_ids=[-1])
    written = json.loads((export_head(head, tmp_path, "vllm") / "config.json").read_text())
    assert written["eagle_config"] == {"use_aux_hidden_state": False}


@pytest.mark.parametrize(
    ("to", "algorithm", "fields"),
    [
        ("vllm", "eagle1", {"fc_bias": True}),
        ("vllm", "eagle1", {"embed_norm": True}),
        ("sglang", "eagle1", {"final_norm": True}),
        ("sglang", "eagle3", {"qk_norm": True}),
        ("eagle", "eagle1", {"fused_norm": True}),
        ("eagle", "eagle3", {"fc_norm": True}),
        ("eagle", "eagle3", {"norm_before_residual": True}),
        ("eagle", "eagle3", {"num_hidden_layers": 2}),
        ("eagle", "eagle3", {"feature_layer_ids": [1, 2, 3, 4]}),
        ("speculators", "eagle3", {"has_fc": False, "feature_layer_ids": [-1]}),
    ],
)
def test_what_a_program_does_not_know_is_refused_by_name(
    target: PreTrainedModel, tmp_path: Path, to: str, algorithm: str, fields: dict[str, Any]
) -> None:
    head = init_for(target, algorithm, **fields)
    word = "last hidden state" if to == "speculators" else next(iter(fields))
    with pytest.raises(ValueError, match=word):
        export_head(head, tmp_path / "out", to)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("states", "nested"), [([2, 4, 5], [1, 3, 4]), ([3, 4, 6], [3, 4, 6]), ([4, 2, 6], [4, 2, 6])])
def test_sglang_is_told_the_layers_in_the_numbers_it_reads(
    target: PreTrainedModel, tmp_path: Path, states: list[int], nested: list[int]
) -> None:
    """It takes a list that begins with 1 for outputs of layers, any other for states."""
    head = init_for(target, "eagle3", feature_layer_ids=states)
    written = json.loads((export_head(head, tmp_path, "sglang") / "config.json").read_text())
    assert written["eagle_config"]["eagle_aux_hidden_state_layer_ids"] == nested
    assert EagleHead.from_pretrained(tmp_path).config.feature_layer_ids == states


def test_sglang_cannot_be_told_of_the_first_layers_output(target: PreTrainedModel, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"\[1, 4, 6\]: it takes a first 1 for a 2"):
        export_head(init_for(target, "eagle3", feature_layer_ids=[1, 4, 6]), tmp_path / "out", "sglang")


def test_unknown_programs_and_misfits_are_refused(target: PreTrainedModel, tmp_path: Path) -> None:
    head = trained(target, "eagle3, the target's rows")
    with pytest.raises(ValueError, match=r"vllm, sglang, eagle, speculators, got 'llama\.cpp'"):
        export_head(head, tmp_path / "out", "llama.cpp")
    with pytest.raises(ValueError, match="reads features 32 wide"):
        export_head(head, tmp_path / "out", "vllm", target=tiny("llama", hidden_size=64))
    assert not (tmp_path / "out").exists()
