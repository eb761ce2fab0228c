# SPDX-License-Identifier: Apache-2.0
"""Quantised and packed models are kept as every transformers model is: `save_pretrained`, `from_pretrained`."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from hf_polyspec.quantization import (
    Int4Linear,
    Int8Linear,
    is_packed,
    load_quantized,
    pack,
    quantize_model,
    save_quantized,
)
from hf_polyspec.quantization.modules import quantized_layers, replace_module

Tiny = Callable[..., PreTrainedModel]
IDS = torch.randint(64, (1, 20), generator=torch.Generator().manual_seed(5))
LAYER = "model.layers.1.mlp.down_proj"


def _model(tiny: Tiny, tied: bool = False, family: str = "llama") -> PreTrainedModel:
    return tiny(family, hidden_size=64, intermediate_size=96, vocab_size=64, tie_word_embeddings=tied)


def _logits(model: Any) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(IDS).logits
    return logits


def _again(folder: Path, dtype: Any = "auto") -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("head_bits", [8, 4, None])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_round_trip(tiny: Tiny, tmp_path: Path, bits: int, head_bits: int | None, tied: bool) -> None:
    original = _model(tiny, tied)
    made = quantize_model(original, bits, 32, head_bits=head_bits)
    wanted = _logits(made)
    made.save_pretrained(tmp_path / "a")
    loaded = _again(tmp_path / "a")
    assert len(quantized_layers(loaded)) == len(quantized_layers(made))
    assert torch.equal(_logits(loaded), wanted)
    assert torch.equal(_logits(load_quantized(tmp_path / "a")), wanted)
    loaded.save_pretrained(tmp_path / "b")
    assert torch.equal(_logits(_again(tmp_path / "b")), wanted)
    assert torch.equal(_logits(made), wanted)
    assert not hasattr(original.config, "quantization_config")
    assert original.config.tie_word_embeddings == tied


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["gpt2", "qwen2"])
def test_other_types_and_layers(tiny: Tiny, tmp_path: Path, family: str, dtype: torch.dtype) -> None:
    """Biases, and layers with turned matrices."""
    settings = {"n_embd": 64, "n_inner": 96} if family == "gpt2" else {"hidden_size": 64, "intermediate_size": 96}
    original = copy.deepcopy(tiny(family, vocab_size=64, **settings))
    with torch.no_grad():  # biases start as zeros
        for name, one in original.named_parameters():
            one.copy_(torch.randn(one.shape, generator=torch.Generator().manual_seed(1)) if "bias" in name else one)
    original.save_pretrained(tmp_path / "float")
    made = quantize_model(_again(tmp_path / "float", dtype), 4, 32)  # cast by `to`, angles would be too
    made.save_pretrained(tmp_path / "made")
    loaded = _again(tmp_path / "made")
    assert loaded.dtype is dtype
    assert torch.equal(_logits(loaded), _logits(made))


def test_mixed_bits(tiny: Tiny, tmp_path: Path) -> None:
    made = quantize_model(_model(tiny), 4, 32, layer_bits={LAYER: 8, "model.layers.0.mlp.up_proj": 3})
    made.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert stored["bits"] == 4
    assert len(stored["dynamic"]) == 3, "the two and the head"
    assert {name: one.bits for name, one in quantized_layers(_again(tmp_path)).items()} == {
        name: one.bits for name, one in quantized_layers(made).items()
    }
    assert torch.equal(_logits(_again(tmp_path)), _logits(made))


def test_what_is_saved_is_the_model_as_it_is_now(tiny: Tiny, tmp_path: Path) -> None:
    """Layers may have been replaced since it was quantised, by the caller or by a copy of a copy."""
    original = _model(tiny)
    made = copy.deepcopy(quantize_model(original, 8))
    for name in ("model.layers.0.mlp.up_proj", "model.layers.1.mlp.up_proj"):
        replace_module(made, name, Int4Linear.from_linear(original.get_submodule(name), group_size=32))
    made.save_pretrained(tmp_path / "a")
    assert torch.equal(_logits(_again(tmp_path / "a")), _logits(made))


def test_nothing_left_to_quantise_is_said(tiny: Tiny) -> None:
    with pytest.raises(ValueError, match="no linear layer that could be quantised"):
        quantize_model(_model(tiny), 8, modules=lambda name, _: False)


def test_a_checkpoint_with_other_zeros_is_saved_with_ours(tiny: Tiny, tmp_path: Path) -> None:
    """Read as gptq_v2, written less one: the config must not go on saying what was read."""
    made = quantize_model(_model(tiny), 4, 32)
    save_quantized(made, tmp_path / "a")
    path = tmp_path / "a" / "config.json"
    path.write_text(path.read_text().replace('"checkpoint_format": "gptq"', '"checkpoint_format": "gptq_v2"'))
    shifted = _again(tmp_path / "a")
    assert not torch.equal(_logits(shifted), _logits(made))
    shifted.save_pretrained(tmp_path / "b")
    assert torch.equal(_logits(_again(tmp_path / "b")), _logits(shifted))


def test_packed_models_are_saved_as_they_are(tiny: Tiny, tmp_path: Path) -> None:
    plain = copy.deepcopy(_model(tiny))
    packed = pack(copy.deepcopy(plain))
    _logits(packed)
    packed.save_pretrained(tmp_path / "float")
    plain.save_pretrained(tmp_path / "plain")
    states = [load_file(tmp_path / name / "model.safetensors") for name in ("float", "plain")]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert is_packed(packed)
    assert not is_packed(_again(tmp_path / "float"))
    made = pack(quantize_model(packed, 4, 32))
    made.save_pretrained(tmp_path / "both")
    assert torch.equal(_logits(pack(_again(tmp_path / "both"))), _logits(made))


def test_a_quantised_copy_may_still_be_cast(tiny: Tiny) -> None:
    made = quantize_model(_model(tiny), 4, 32)
    assert made.to(torch.bfloat16).dtype is torch.bfloat16
    assert made.float().dtype is torch.float32


def test_models_that_transformers_does_not_know(tmp_path: Path) -> None:
    made = quantize_model(torch.nn.Sequential(torch.nn.Linear(32, 32)), 8)
    assert isinstance(made[0], Int8Linear)
