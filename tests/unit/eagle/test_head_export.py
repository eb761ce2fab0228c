# SPDX-License-Identifier: Apache-2.0
"""Export to the official and the speculators layout and back changes no logit."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from hf_polyspec.eagle import EagleHead, EagleHeadConfig
from hf_polyspec.eagle.formats.export import export_official, export_speculators

V, H = 41, 16
TARGET = "org/target"


def to_speculators(head: EagleHead, folder: Path, **how: Any) -> Path:
    return export_speculators(head, folder, verifier=TARGET, **how)


SIZES = {
    "vocab_size": V, "hidden_size": H, "intermediate_size": 20, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 6,
}  # fmt: skip


def randomised(config: EagleHeadConfig) -> EagleHead:
    torch.manual_seed(0)
    head = EagleHead(config).eval()
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
        if config.maps_vocabulary:
            ids = torch.randperm(V)[: config.draft_vocab_size].sort().values
            head.d2t.copy_(ids - torch.arange(len(ids)))
    return head


@pytest.fixture(scope="module")
def parts() -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(1)
    return nn.Embedding(V, H), nn.Linear(H, V, bias=False)


@torch.no_grad()
def behaviour(head: EagleHead, parts: tuple[nn.Module, nn.Module]) -> torch.Tensor:
    """Logits over four draft steps after a prefill."""
    head.bind(*parts)
    generator = torch.Generator().manual_seed(2)
    tokens = torch.randint(0, V, (2, 5), generator=generator)
    features = torch.randn(2, 5, head.config.feature_size, generator=generator)
    cache, collected = head.new_cache(), []
    y = head.step(tokens, head.fuse(features), cache=cache)
    for _ in range(4):
        collected.append(head.logits(y[:, -1:]))
        token = head.draft_to_target(collected[-1].argmax(-1))
        y = head.step(token, y[:, -1:], cache=cache)
    return torch.cat(collected, dim=1)


EAGLE1: dict[str, dict[str, Any]] = {
    "plain": {},
    "bias": {"fc_bias": True},
    "qkv bias": {"attention_bias": True},
    "all norms": {"embed_norm": True, "fused_norm": True, "final_norm": True},
    "theta": {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}},
}
EAGLE3: dict[str, dict[str, Any]] = {
    "plain": {},
    "mapped": {"draft_vocab_size": 11},
    "listed layers": {"feature_layer_ids": [2, 5, 7]},
    "default layers": {"feature_layer_ids": [2, 16, 29]},
    "ambiguous layers": {"feature_layer_ids": [3, 17, 30]},
    "layers from the embedding on": {"feature_layer_ids": [0, 2, 4]},
    "five features": {"feature_layer_ids": [1, 2, 3, 4, 5]},
    "wide target": {"target_hidden_size": 24, "own_embedding": True, "draft_vocab_size": 11},
    "norm_before_residual": {"norm_before_residual": True},
    "norm_before_fc": {"norm_before_fc": True},
    "fc_norm": {"fc_norm": True},
    "two layers": {"num_hidden_layers": 2},
    "sliding window": {"sliding_window": 3},
    "scaled rope": {"rope_parameters": {"rope_type": "linear", "rope_theta": 900.0, "factor": 2.0}},
    "partial rope": {"rope_parameters": {"rope_theta": 900.0, "partial_rotary_factor": 2 / 3}},
}


@pytest.mark.parametrize("name", list(EAGLE1))
@pytest.mark.parametrize("layout", [export_official, to_speculators])
def test_eagle1_round_trip(tmp_path: Path, parts: Any, name: str, layout: Any) -> None:
    head = randomised(EagleHeadConfig(algorithm="eagle1", **SIZES, **EAGLE1[name]))
    before = behaviour(head, parts)
    again = EagleHead.from_pretrained(layout(head, tmp_path))
    assert torch.equal(behaviour(again, parts), before)
    assert not again.config.own_embedding  # the stored copy equals the target's and was let go


@pytest.mark.filterwarnings("ignore:.*is no default list:UserWarning")
@pytest.mark.parametrize("name", list(EAGLE3))
@pytest.mark.parametrize("layout", [export_official, to_speculators])
def test_eagle3_round_trip(tmp_path: Path, parts: Any, name: str, layout: Any) -> None:
    head = randomised(EagleHeadConfig(algorithm="eagle3", **SIZES, **EAGLE3[name]))
    before = behaviour(head, parts)
    again = EagleHead.from_pretrained(layout(head, tmp_path))
    assert torch.equal(behaviour(again, parts), before)
    assert again.config.feature_layer_ids == head.config.feature_layer_ids


def test_norm_output_and_head_norms_in_speculators(tmp_path: Path, parts: Any) -> None:
    head = randomised(EagleHeadConfig(algorithm="eagle3", **SIZES, norm_output=True, qk_norm=True))
    before = behaviour(head, parts)
    again = EagleHead.from_pretrained(to_speculators(head, tmp_path))
    assert torch.equal(behaviour(again, parts), before)
    with pytest.raises(ValueError, match="qk_norm"):
        export_official(head, tmp_path / "other")


def test_last_hidden_state_only(tmp_path: Path, parts: Any) -> None:
    config = EagleHeadConfig(algorithm="eagle3", **SIZES, has_fc=False, feature_layer_ids=[-1])
    head = randomised(config)
    before = behaviour(head, parts)
    assert torch.equal(behaviour(EagleHead.from_pretrained(export_official(head, tmp_path)), parts), before)
    with pytest.raises(ValueError, match="last hidden state"):
        export_speculators(head, tmp_path / "other")


@pytest.mark.parametrize("layout", [export_official, to_speculators])
def test_rows_of_the_few_ids_it_scores_are_written_out(tmp_path: Path, parts: Any, layout: Any) -> None:
    head = randomised(EagleHeadConfig(algorithm="eagle3", **SIZES, own_lm_head=False, draft_vocab_size=11))
    with pytest.raises(ValueError, match="must hold its target's lm_head's rows: bind"):
        layout(head, tmp_path)
    assert not list(tmp_path.iterdir())
    before = behaviour(head, parts)
    again = EagleHead.from_pretrained(layout(head, tmp_path))
    assert again.config.own_lm_head
    torch.testing.assert_close(behaviour(again, parts), before, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("layout", [export_official, to_speculators])
@pytest.mark.parametrize("bound", [True, False])
def test_the_targets_whole_lm_head_is_left_out(tmp_path: Path, parts: Any, layout: Any, bound: bool) -> None:
    head = randomised(EagleHeadConfig(algorithm="eagle3", **SIZES, own_lm_head=False))
    before = behaviour(copy.deepcopy(head), parts)
    layout(head.bind(*parts) if bound else head, tmp_path)
    assert not {"lm_head.weight", "embed_tokens.weight"} & load_file(tmp_path / "model.safetensors").keys()
    again = EagleHead.from_pretrained(tmp_path)
    assert not again.config.own_lm_head
    assert torch.equal(behaviour(again, parts), before)


def test_sglang_is_told_to_take_the_targets_lm_head(tmp_path: Path) -> None:
    """It does so where `draft_vocab_size` is in the config and null; the speculators library wants a number."""
    head = randomised(EagleHeadConfig(algorithm="eagle3", **SIZES, own_lm_head=False))
    export_official(head, tmp_path / "official")
    written = json.loads((tmp_path / "official" / "config.json").read_text())
    assert "draft_vocab_size" in written
    assert written["draft_vocab_size"] is None
    to_speculators(head, tmp_path / "speculators")
    assert json.loads((tmp_path / "speculators" / "config.json").read_text())["draft_vocab_size"] == V


def test_scaled_and_capped_lm_heads(tmp_path: Path, parts: Any) -> None:
    head = randomised(EagleHeadConfig(algorithm="eagle3", **SIZES, own_lm_head=False))
    head.bind(*parts, logit_scale=0.25)
    stored = load_file(export_official(head, tmp_path, lm_head=True) / "model.safetensors")
    torch.testing.assert_close(stored["lm_head.weight"], parts[1].weight.detach() * 0.25)
    head.bind(*parts, logit_softcap=30.0)
    with pytest.raises(ValueError, match="caps its logits"):
        export_official(head, tmp_path / "other", lm_head=True)
    head.bind(parts[0], nn.Linear(H, V))
    with pytest.raises(ValueError, match="bias"):
        export_official(head, tmp_path / "other", lm_head=True)


def test_official_names(tmp_path: Path, parts: Any) -> None:
    """The files hold exactly the keys of the published ones."""
    layer = {f"self_attn.{p}_proj.weight" for p in "qkvo"} | {f"mlp.{p}_proj.weight" for p in ("gate", "up", "down")}
    layer |= {"post_attention_layernorm.weight"}
    one = randomised(EagleHeadConfig(algorithm="eagle1", **SIZES, fc_bias=True)).bind(*parts)
    stored = load_file(export_official(one, tmp_path / "1") / "model.safetensors")
    assert stored.keys() == {"embed_tokens.weight", "fc.weight", "fc.bias"} | {f"layers.0.{name}" for name in layer}
    three = randomised(EagleHeadConfig(algorithm="eagle3", **SIZES, draft_vocab_size=11)).bind(*parts)
    stored = load_file(export_official(three, tmp_path / "3") / "model.safetensors")
    layer |= {"input_layernorm.weight", "hidden_norm.weight"}
    names = {f"midlayer.{name}" for name in layer}
    assert stored.keys() == {"fc.weight", "norm.weight", "lm_head.weight", "d2t", "t2d"} | names
    assert stored["t2d"].sum() == 11
    assert stored["t2d"].dtype == torch.bool
    assert stored["t2d"][three.target_ids()].all()


def test_embedding_on_request(tmp_path: Path, parts: Any) -> None:
    head = randomised(EagleHeadConfig(algorithm="eagle1", **SIZES)).bind(*parts)
    stored = load_file(export_official(head, tmp_path / "no", embedding=False) / "model.safetensors")
    assert "embed_tokens.weight" not in stored

    class Scaled(nn.Embedding):
        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return super().forward(ids) * 4.0

    scaled = Scaled(V, H)
    head.bind(scaled, parts[1])
    stored = load_file(export_official(head, tmp_path / "yes") / "model.safetensors")
    torch.testing.assert_close(stored["embed_tokens.weight"], scaled.weight.detach() * 4.0)


def test_nothing_is_overwritten_unasked(tmp_path: Path, parts: Any) -> None:
    head = randomised(EagleHeadConfig(algorithm="eagle3", **SIZES)).bind(*parts)
    export_official(head, tmp_path)
    before = (tmp_path / "config.json").read_bytes()
    with pytest.raises(FileExistsError, match="overwrite=True"):
        to_speculators(head, tmp_path)
    assert (tmp_path / "config.json").read_bytes() == before
    to_speculators(head, tmp_path, overwrite=True)
    assert json.loads((tmp_path / "config.json").read_text())["speculators_model_type"] == "eagle3"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]


@pytest.mark.parametrize(
    "name", ["model-00001-of-00002.safetensors", "model.safetensors.index.json", "pytorch_model.bin"]
)
def test_other_files_of_weights_are_in_the_way_too(tmp_path: Path, parts: Any, name: str) -> None:
    """vLLM reads every safetensors file of a folder."""
    head = randomised(EagleHeadConfig(algorithm="eagle3", **SIZES)).bind(*parts)
    (tmp_path / name).write_bytes(b"old")
    with pytest.raises(FileExistsError, match=name):
        export_official(head, tmp_path)
    export_official(head, tmp_path, overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]


def test_exporting_changes_no_head(tmp_path: Path, parts: Any) -> None:
    head = randomised(EagleHeadConfig(algorithm="eagle3", **SIZES, own_lm_head=False, draft_vocab_size=11)).bind(*parts)
    before = (copy.deepcopy(head.state_dict()), head.config.to_dict())
    export_official(head, tmp_path)
    assert head.state_dict().keys() == before[0].keys()
    assert all(torch.equal(tensor, before[0][name]) for name, tensor in head.state_dict().items())
    assert head.config.to_dict() == before[1]


def test_speculators_eagle1_norms_come_together(tmp_path: Path, parts: Any) -> None:
    head = randomised(EagleHeadConfig(algorithm="eagle1", **SIZES, embed_norm=True)).bind(*parts)
    with pytest.raises(ValueError, match="three extra norms"):
        export_speculators(head, tmp_path)


# -- this library's own layout -----------------------------------------------------------------------------


@pytest.mark.parametrize("algorithm", ["eagle1", "eagle3"])
def test_save_and_load(tmp_path: Path, parts: Any, algorithm: str) -> None:
    head = randomised(EagleHeadConfig(algorithm=algorithm, **SIZES, own_lm_head=False, draft_vocab_size=11))
    before = behaviour(head, parts)
    head.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    assert not {"embed_tokens.weight", "lm_head.weight"} & stored.keys()
    again = EagleHead.from_pretrained(tmp_path)
    assert torch.equal(behaviour(again, parts), before)
    assert again.config.to_dict().keys() == head.config.to_dict().keys()
    assert again.name_or_path == str(tmp_path)


def test_own_layout_accounts_for_keys_too(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    randomised(EagleHeadConfig(algorithm="eagle3", **SIZES)).save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    del stored["norm.weight"]
    save_file(stored | {"odd": torch.zeros(1)}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"missing keys: norm.weight; unexpected keys: odd"):
        EagleHead.from_pretrained(tmp_path)


def test_auto_classes(tmp_path: Path) -> None:
    from transformers import AutoConfig, AutoModel

    randomised(EagleHeadConfig(algorithm="eagle3", **SIZES)).save_pretrained(tmp_path)
    assert isinstance(AutoConfig.from_pretrained(tmp_path), EagleHeadConfig)
    assert isinstance(AutoModel.from_pretrained(tmp_path), EagleHead)


def test_device_map_and_loading_info(tmp_path: Path) -> None:
    head = randomised(EagleHeadConfig(algorithm="eagle3", **SIZES))
    head.save_pretrained(tmp_path)
    loaded, info = EagleHead.from_pretrained(tmp_path, device_map="cpu", output_loading_info=True)
    assert torch.equal(loaded.fc.weight, head.fc.weight)
    assert not any(info[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert not loaded.training
