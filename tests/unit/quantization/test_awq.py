# SPDX-License-Identifier: Apache-2.0
"""Activation-aware scales: folded without changing what the model computes, and worth it where channels are large."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from architectures import ARCHITECTURES
from transformers import PreTrainedModel

from hf_polyspec.quantization import agreement, fold_scales, input_moments, load_quantized, pack, quantize_model
from hf_polyspec.quantization.awq import Fold, apply_fold, usable_folds
from hf_polyspec.quantization.checkpoint import save_quantized
from hf_polyspec.quantization.modules import sharing_copy

Tiny = Callable[..., PreTrainedModel]
IDS = torch.randint(48, (4, 30), generator=torch.Generator().manual_seed(9))
HELD_OUT = torch.randint(48, (6, 30), generator=torch.Generator().manual_seed(10))
NOT_FOLDED = {"falcon", "roberta"}


@pytest.fixture(scope="module")
def outliers(tiny: Tiny) -> PreTrainedModel:
    """A model some of whose channels are ten times as large as others, as in trained ones."""
    model = tiny("llama", hidden_size=64, intermediate_size=96, num_hidden_layers=1, initializer_range=0.12)
    with torch.no_grad():
        for layer in model.model.layers:
            for norm in (layer.input_layernorm, layer.post_attention_layernorm):
                norm.weight[::9] *= 12
                norm.weight /= 1.5
    return model


@pytest.fixture(scope="module")
def moments(outliers: PreTrainedModel) -> dict[str, torch.Tensor]:
    return input_moments(outliers, IDS)


def test_folding_changes_nothing_but_the_rounding(outliers, moments) -> None:
    before = {name: tensor.clone() for name, tensor in outliers.state_dict().items()}
    folded = fold_scales(outliers, moments, 4, 32)
    torch.testing.assert_close(folded.model(HELD_OUT).logits, outliers(HELD_OUT).logits, rtol=1e-3, atol=1e-3)
    assert all(torch.equal(tensor, before[name]) for name, tensor in outliers.state_dict().items())
    changed = [name for name, tensor in folded.model.state_dict().items() if not torch.equal(tensor, before[name])]
    assert any("norm" in name for name in changed)
    assert folded.model.model.embed_tokens.weight.data_ptr() == outliers.model.embed_tokens.weight.data_ptr()
    measured = input_moments(folded.model, IDS)
    for name, moment in folded.moments.items():
        torch.testing.assert_close(moment, measured[name], rtol=1e-2, atol=1e-2)


def test_a_packed_model_is_folded_like_any_other(outliers, moments) -> None:
    wanted = fold_scales(outliers, moments, 4, 32)
    packed = pack(copy.deepcopy(outliers))
    outliers_logits = packed(HELD_OUT).logits
    found = fold_scales(packed, moments, 4, 32)
    assert found.moments.keys() == wanted.moments.keys()
    for name, tensor in wanted.model.state_dict().items():
        torch.testing.assert_close(found.model.state_dict()[name], tensor, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.model(HELD_OUT).logits, outliers_logits, rtol=1e-3, atol=1e-3)


def test_scales_are_worth_it(outliers, moments) -> None:
    copies = {
        method: quantize_model(outliers, 4, 32, method=method, calibration=moments)
        for method in ("rtn", "awq", "gptq", "awq+gptq")
    }
    scores = {method: agreement(outliers, made, HELD_OUT) for method, made in copies.items()}
    assert scores["awq"] > scores["rtn"] + 0.01
    assert scores["awq+gptq"] > scores["gptq"] + 0.005


def test_a_folded_model_is_saved_with_its_norms(outliers, moments, tmp_path) -> None:
    made = quantize_model(outliers, 4, 32, method="awq", calibration=moments)
    loaded = load_quantized(save_quantized(made, tmp_path))
    torch.testing.assert_close(loaded(HELD_OUT).logits, made(HELD_OUT).logits)
    assert not torch.equal(loaded.model.norm.weight, loaded.model.layers[0].input_layernorm.weight)


@pytest.mark.parametrize("model_type", sorted({case.model_type for case in ARCHITECTURES} & {
    "llama", "qwen2_moe", "gemma", "gemma2", "phi", "gpt2", "gpt_neox", "opt", "bloom", "cohere", "olmo2",
    "deepseek_v3", "falcon", "roberta", "nemotron",
}))  # fmt: skip
def test_every_fold_that_is_used_is_exact(tiny: Tiny, model_type: str) -> None:
    case = next(case for case in ARCHITECTURES if case.model_type == model_type)
    model = tiny(case.model_type, attention=case.attention[0], **case.settings)
    if model_type in NOT_FOLDED:
        with pytest.raises(ValueError, match=f"{type(model).__name__} has no norm or projection"):
            usable_folds(model)
        return
    trial = sharing_copy(model)
    folds = usable_folds(model)
    for fold in folds:
        module = model.get_submodule(fold.before)
        channels = module.out_features if hasattr(module, "out_features") else module.weight.shape[0]
        assert apply_fold(trial, fold, torch.linspace(0.3, 4.0, channels))
    torch.testing.assert_close(trial(HELD_OUT).logits, model(HELD_OUT).logits, rtol=1e-3, atol=1e-3)


def test_a_norm_that_feeds_more_than_linear_layers_is_left_alone(tiny: Tiny) -> None:
    """A Mixtral's router reads the second norm without being an nn.Linear: folding it would change the routing."""
    case = next(case for case in ARCHITECTURES if case.model_type == "mixtral")
    kinds = {fold.kind for fold in usable_folds(tiny(case.model_type, **case.settings))}
    assert "input_layernorm q_proj k_proj v_proj" in kinds
    assert not any("post_attention_layernorm" in kind for kind in kinds)


def test_heads_that_share_keys_share_their_factors() -> None:
    fold = Fold("v", ("o",), repeats=2, block=2)
    assert fold.spread(torch.tensor([1.0, 2, 3, 4])).tolist() == [1, 2, 1, 2, 3, 4, 3, 4]
    assert fold.gather(torch.tensor([1.0, 2, 3, 4, 5, 6, 7, 8])).tolist() == [2, 3, 6, 7]


def test_refusals(outliers) -> None:
    with pytest.raises(ValueError, match="needs calibration"):
        quantize_model(outliers, 4, method="awq")
    with pytest.raises(ValueError, match="whole second moments"):
        quantize_model(outliers, 4, 32, method="awq", calibration=input_moments(outliers, IDS[:1], diagonal=True))
