# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of models whose head is tied to their embeddings: the matrix is there once, the head comes back whole."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from hf_polyspec.quantization import load_quantized, quantize_model, save_quantized
from hf_polyspec.quantization.modules import quantized_layers

Tiny = Callable[..., PreTrainedModel]
WIDE = {"hidden_size": 64, "intermediate_size": 96, "vocab_size": 640}


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=torch.arange(12)[None] * 7).logits
    return found


def size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("head_bits", [8, 4])
def test_the_embeddings_are_kept_once_and_give_the_head_back(
    tiny: Tiny, tmp_path: Path, dtype: torch.dtype, head_bits: int
) -> None:
    model = tiny("llama", tie_word_embeddings=True, initializer_range=0.1, **WIDE)
    model.to(dtype).save_pretrained(tmp_path / "original")
    original = size(tmp_path / "original")
    # Loaded, since casting casts what must not be: the frequencies of positions.
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "original", dtype=dtype)
    made = quantize_model(model, 8, head_bits=head_bits)
    save_quantized(made, tmp_path / "made")
    names = set(load_file(tmp_path / "made" / "model.safetensors"))
    assert not any(name.startswith("lm_head") for name in names)
    assert size(tmp_path / "made") < original
    config = json.loads((tmp_path / "made" / "config.json").read_text())
    assert config["tie_word_embeddings"] is True
    assert config["quantization_config"]["lm_head"] is False  # what other loaders find: a float head, tied
    assert not config["quantization_config"]["dynamic"]
    again = load_quantized(tmp_path / "made")
    assert again.get_output_embeddings() is quantized_layers(again)["lm_head"]
    assert torch.equal(logits(again), logits(made))
    save_quantized(again, tmp_path / "twice")
    assert set(load_file(tmp_path / "twice" / "model.safetensors")) == names
    assert torch.equal(logits(load_quantized(tmp_path / "twice")), logits(made))


def test_a_narrower_type_does_not_change_the_head(tiny: Tiny, tmp_path: Path) -> None:
    made = quantize_model(tiny("llama", tie_word_embeddings=True, initializer_range=0.1, **WIDE), 8)
    again = load_quantized(save_quantized(made, tmp_path), dtype=torch.bfloat16)
    one, other = (quantized_layers(model)["lm_head"] for model in (made, again))
    assert torch.equal(one.codes, other.codes)
    assert torch.equal(one.scales, other.scales)


def test_a_head_that_is_not_the_embeddings_rounded_is_kept(tiny: Tiny, tmp_path: Path) -> None:
    model = tiny("llama", tie_word_embeddings=True, initializer_range=0.1, **WIDE)
    made = quantize_model(model, 8)
    made.get_output_embeddings().codes[3, 5] ^= 1  # as a method that looks at data would have rounded
    save_quantized(made, tmp_path)
    assert "lm_head.qweight" in load_file(tmp_path / "model.safetensors")
    assert json.loads((tmp_path / "config.json").read_text())["tie_word_embeddings"] is False
    assert torch.equal(logits(load_quantized(tmp_path)), logits(made))


def test_a_float_head_is_kept_once(tiny: Tiny, tmp_path: Path) -> None:
    made = quantize_model(tiny("llama", tie_word_embeddings=True, **WIDE), 8, head_bits=None)
    save_quantized(made, tmp_path)
    kept = load_file(tmp_path / "model.safetensors")
    assert sum(tuple(tensor.shape) == (640, 64) for tensor in kept.values()) == 1
    assert torch.equal(logits(load_quantized(tmp_path)), logits(made))
