# SPDX-License-Identifier: Apache-2.0
"""Heads from and to the hub, on devices, and under quantised, padded and wrapped targets."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from hf_polyspec.eagle import EagleHead, EagleHeadConfig, bind, feature_layers, init_for, select_features
from hf_polyspec.eagle.formats import files as formats_files

SIZES = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4,
    "num_key_value_heads": 2,
}  # fmt: skip


def target_model(**fields: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES, num_hidden_layers=6, **fields)).eval()


@torch.no_grad()
def run(head: EagleHead, model: Any) -> torch.Tensor:
    layers = feature_layers(head.config, 6)
    ids = torch.arange(3, 13)[None]
    features = select_features(model(ids, output_hidden_states=layers).hidden_states, layers)
    return head(ids[:, 1:], features[:, :-1]).logits


def test_hub_id_passes_its_arguments_on(kit: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every file of a hub id is asked for with the caller's revision, token and cache."""
    config, w = kit.eagle3()
    kit.write(tmp_path, config, w)
    asked: list[tuple[str, str, dict[str, Any]]] = []

    def fake(source: str, name: str, **kwargs: Any) -> str | None:
        asked.append((source, name, kwargs))
        path = tmp_path / name
        return str(path) if path.exists() else None

    monkeypatch.setattr(formats_files, "cached_file", fake)
    hub = {
        "revision": "abc",
        "token": "t",
        "cache_dir": "/c",
        "local_files_only": True,
        "force_download": True,
    }
    head = EagleHead.from_pretrained("someone/head", **hub)
    assert torch.equal(head.fc.weight.data, w["fc.weight"])
    assert [name for _, name, _ in asked] == ["config.json", "model.safetensors"]
    for source, _, kwargs in asked:
        assert source == "someone/head"
        assert hub.items() <= kwargs.items()
    assert head.config.name_or_path == "someone/head"


def test_push_to_hub_sends_what_save_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sent: dict[str, set[str]] = {}

    def upload(self: EagleHead, folder: str, repo_id: str, *args: Any, **kwargs: Any) -> None:
        sent[repo_id] = {path.name for path in Path(folder).iterdir()}

    def create(self: Any, repo_id: str, *args: Any, **kwargs: Any) -> SimpleNamespace:
        return SimpleNamespace(repo_id=repo_id)

    class Card:
        def save(self, path: str) -> None:
            Path(path).write_text("")

    monkeypatch.setattr(EagleHead, "_upload_modified_files", upload)
    monkeypatch.setattr("huggingface_hub.HfApi.create_repo", create)
    for module in ("transformers.modeling_utils", "transformers.utils.hub"):
        monkeypatch.setattr(f"{module}.create_and_tag_model_card", lambda *a, **k: Card(), raising=False)
        monkeypatch.setattr(f"{module}.create_repo", lambda repo_id, **k: create(None, repo_id), raising=False)
    EagleHead(EagleHeadConfig(**SIZES)).push_to_hub("me/head")
    assert {"config.json", "model.safetensors"} <= sent["me/head"]


def test_device_map_auto(tmp_path: Path) -> None:
    head = init_for(target_model(), "eagle3").eval()
    head.save_pretrained(tmp_path)
    again = bind(EagleHead.from_pretrained(tmp_path, device_map="auto"), target_model())
    assert torch.equal(run(again, target_model()), run(head, target_model()))


def test_head_in_another_dtype_than_its_target() -> None:
    model = target_model()
    head = init_for(model, "eagle1", list(range(0, 64, 2))).eval()
    wide = run(head, model)
    narrow = run(head.to(torch.bfloat16), model)
    assert narrow.dtype == torch.bfloat16
    torch.testing.assert_close(narrow.float(), wide, atol=0.05, rtol=0.05)


class Packed(nn.Module):
    """A linear layer that keeps its rows as int8, like quantised ones do: no floating-point `weight`."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.scale = linear.weight.detach().abs().amax(1, keepdim=True) / 127
        self.weight = nn.Parameter((linear.weight.detach() / self.scale).round().to(torch.int8), requires_grad=False)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden @ (self.weight.float() * self.scale).T


@torch.no_grad()
def test_quantised_lm_head_is_called_not_read() -> None:
    model = target_model()
    head = init_for(model, "eagle1").eval()
    before = run(head, model)
    model.lm_head = Packed(model.lm_head)
    bind(head, model)
    torch.testing.assert_close(run(head, model), before, atol=0.02, rtol=0.05)
    with pytest.raises(ValueError, match="quantised"):
        head.vocabulary_slice(torch.tensor([1, 2]))
    mapped = init_for(model, "eagle3", [1, 2, 3], own_lm_head=False)
    with pytest.raises(ValueError, match="quantised"):
        mapped.logits(torch.zeros(1, 1, 32))


def test_head_under_a_quantised_middle() -> None:
    from hf_polyspec.quantization import quantize_model

    model = target_model()
    head = init_for(model, "eagle3").eval()
    exact = run(head, model)
    middle = quantize_model(model, bits=8)
    close = run(bind(head, middle), middle)
    torch.testing.assert_close(close, exact, atol=0.1, rtol=0.1)
    assert head.get_input_embeddings() is middle.get_input_embeddings()


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_head_under_a_peft_wrapped_target() -> None:
    model = target_model()
    head = init_for(model, "eagle1").eval()
    before = run(head, model)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"])).eval()
    assert torch.equal(run(bind(head, wrapped), wrapped), before)


def test_head_under_a_target_with_padded_rows() -> None:
    model = target_model()
    head = init_for(model, "eagle1").eval()
    before = run(head, model)
    model.resize_token_embeddings(pad_to_multiple_of=128)
    assert run(bind(head, model), model).shape == before.shape
    torch.testing.assert_close(run(head, model), before)


def test_config_survives_json(tmp_path: Path) -> None:
    config = EagleHeadConfig(**SIZES, feature_layer_ids=[1, 2, 4], norm_output=True, sliding_window=9)
    config.save_pretrained(tmp_path)
    again = EagleHeadConfig.from_pretrained(tmp_path)
    for name in EagleHeadConfig.field_names():
        assert getattr(again, name) == getattr(config, name), name
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "polyspec_eagle"


def test_the_callers_rope_settings_stay_as_they_were() -> None:
    rope = {"rope_theta": 500.0}
    EagleHeadConfig(**SIZES, rope_parameters=rope)
    assert rope == {"rope_theta": 500.0}
