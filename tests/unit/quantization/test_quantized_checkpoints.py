# SPDX-License-Identifier: Apache-2.0
"""Checkpoints: ours through from_pretrained and back, other writers' as they are."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from hf_polyspec.integers.gptq_format import to_gptq
from hf_polyspec.integers.weights import round_to_nearest
from hf_polyspec.models.by_name import load_model
from hf_polyspec.quantization import QuantizedWeight, load_quantized, quantize_model, save_quantized
from hf_polyspec.quantization.config import read_config
from hf_polyspec.quantization.model import linear_layers
from hf_polyspec.quantization.modules import quantized_layers, replace_module, sharing_copy

Tiny = Callable[..., PreTrainedModel]
IDS = torch.randint(48, (1, 20), generator=torch.Generator().manual_seed(5))


def _logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = model(IDS).logits
    return logits


@pytest.fixture(scope="module")
def model(tiny: Tiny) -> PreTrainedModel:
    return tiny("llama", hidden_size=64, intermediate_size=96, initializer_range=0.1)


@pytest.mark.parametrize(("bits", "head_bits"), [(8, 8), (4, 8), (4, None), (3, None)])
@pytest.mark.parametrize("tied", [True, False])
def test_round_trip_through_from_pretrained(
    tiny: Tiny, tmp_path: Path, bits: int, head_bits: int | None, tied: bool
) -> None:
    original = tiny("llama", hidden_size=64, intermediate_size=96, tie_word_embeddings=tied, vocab_size=64)
    copy = quantize_model(original, bits, 32, head_bits=head_bits)
    save_quantized(copy, tmp_path / "a")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "a")
    assert torch.equal(_logits(loaded), _logits(copy))
    assert torch.equal(_logits(load_quantized(tmp_path / "a")), _logits(copy))
    loaded.save_pretrained(tmp_path / "b")
    assert torch.equal(_logits(AutoModelForCausalLM.from_pretrained(tmp_path / "b")), _logits(copy))
    assert original.config.tie_word_embeddings == tied
    assert not hasattr(original.config, "quantization_config")


def test_dtype_is_the_callers_and_scales_stay(model: PreTrainedModel, tmp_path: Path) -> None:
    copy = quantize_model(model, 4, 32)
    save_quantized(copy, tmp_path)
    loaded = load_quantized(tmp_path, dtype=torch.bfloat16)
    assert next(loaded.parameters()).dtype == torch.bfloat16
    for name, layer in quantized_layers(loaded).items():
        assert torch.equal(layer.weight, quantized_layers(copy)[name].weight)
    assert load_quantized(tmp_path).dtype == torch.float32


def test_layers_of_several_widths(model: PreTrainedModel, tmp_path: Path) -> None:
    special = "model.layers.1.mlp.down_proj"
    copy = quantize_model(model, 4, 32, layer_bits={special: 8})
    save_quantized(copy, tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert stored["bits"] == 4
    assert stored["dynamic"][f"+:^{special}$".replace(".", r"\.")]["bits"] == 8
    assert torch.equal(_logits(load_quantized(tmp_path)), _logits(copy))


def test_other_loaders_can_be_addressed(model: PreTrainedModel, tmp_path: Path) -> None:
    copy = quantize_model(model, 4, 32, head_bits=None)
    save_quantized(copy, tmp_path, quant_method="gptq")
    assert json.loads((tmp_path / "config.json").read_text())["quantization_config"]["quant_method"] == "gptq"
    assert torch.equal(_logits(load_quantized(tmp_path)), _logits(copy))


def _foreign(model: PreTrainedModel, folder: Path, *, version: int, act_order: bool, symmetric: bool) -> Any:
    """Write a checkpoint as other packages do, and return the float model it stands for."""
    generator = torch.Generator().manual_seed(1)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    expected: Any = sharing_copy(model)
    for name, layer in linear_layers(model, lambda name, _: name != "lm_head").items():
        weight = round_to_nearest(layer.weight.detach(), 4, 32, symmetric)
        if act_order:
            order = torch.randperm(weight.shape[1], generator=generator)
            weight = QuantizedWeight(weight.codes[:, order], weight.scales, weight.zeros, weight.g_idx[order], 4, 32)
        del state[f"{name}.weight"]
        state.update({f"{name}.{key}": tensor for key, tensor in to_gptq(weight, version).items()})
        plain = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        plain.weight = torch.nn.Parameter(weight.dequantize())
        replace_module(expected, name, plain)
    folder.mkdir(parents=True, exist_ok=True)
    model.config.save_pretrained(folder)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    return expected


def _check_numbers(loaded: Any, expected: Any) -> None:
    """The layers stand for exactly the float model's matrices, and everything else is the float model's."""
    layers, plain = quantized_layers(loaded), sharing_copy(loaded)
    assert len(layers) == 14
    for name, layer in layers.items():
        assert torch.equal(layer.weight, expected.get_submodule(name).weight)
        linear = torch.nn.Linear(layer.in_features, layer.out_features, bias=False)
        linear.weight = torch.nn.Parameter(layer.weight)
        replace_module(plain, name, linear)
    assert torch.equal(_logits(plain), _logits(expected))
    # The layers round activations to 16 bits.
    off = _logits(loaded) - _logits(expected)
    assert float(off.norm() / _logits(expected).norm()) < 1e-4


def _describe(folder: Path, **settings: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "quantization_config": settings}))


WRITERS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "gptqmodel": (
        {"version": 1, "act_order": False, "symmetric": True},
        {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": True, "lm_head": False,
         "checkpoint_format": "gptq", "pack_dtype": "int32", "meta": {"quantizer": ["gptqmodel:5.0"]}},
    ),
    "gptqmodel v2": (
        {"version": 2, "act_order": False, "symmetric": False},
        {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": False,
         "checkpoint_format": "gptq_v2"},
    ),
    "act-order": (
        {"version": 1, "act_order": True, "symmetric": False},
        {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": True, "sym": False, "damp_percent": 0.1},
    ),
    "AutoRound": (
        {"version": 1, "act_order": False, "symmetric": True},
        {"quant_method": "auto-round", "packing_format": "auto_round:auto_gptq", "bits": 4, "group_size": 32,
         "sym": True, "data_type": "int", "iters": 200, "autoround_version": "0.5.1"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("writer", WRITERS)
def test_checkpoints_of_other_writers(model: PreTrainedModel, tmp_path: Path, writer: str) -> None:
    layout, settings = WRITERS[writer]
    expected = _foreign(model, tmp_path, **layout)
    _describe(tmp_path, **settings)
    _check_numbers(load_quantized(tmp_path, dtype=torch.float32), expected)


def test_the_wrong_version_reads_other_weights(model: PreTrainedModel, tmp_path: Path) -> None:
    expected = _foreign(model, tmp_path, version=1, act_order=False, symmetric=True)
    _describe(tmp_path, quant_method="gptq", bits=4, group_size=32, checkpoint_format="gptq_v2")
    assert (_logits(load_quantized(tmp_path, dtype=torch.float32)) - _logits(expected)).abs().max() > 1e-2


def test_autogptq_folder_with_its_own_names(model: PreTrainedModel, tmp_path: Path) -> None:
    expected = _foreign(model, tmp_path, version=1, act_order=False, symmetric=False)
    (tmp_path / "model.safetensors").rename(tmp_path / "gptq_model-4bit-32g.safetensors")
    (tmp_path / "quantize_config.json").write_text(
        json.dumps({"bits": 4, "group_size": 32, "damp_percent": 0.01, "desc_act": False, "sym": False})
    )
    _check_numbers(load_quantized(tmp_path, dtype=torch.float32), expected)


def test_checkpoints_without_g_idx(model: PreTrainedModel, tmp_path: Path) -> None:
    expected = _foreign(model, tmp_path, version=1, act_order=False, symmetric=True)
    path = tmp_path / "model.safetensors"
    state = {name: tensor for name, tensor in load_file(path).items() if not name.endswith("g_idx")}
    save_file(state, path, metadata={"format": "pt"})
    _describe(tmp_path, quant_method="gptq", bits=4, group_size=32, sym=True)
    _check_numbers(load_quantized(tmp_path, dtype=torch.float32), expected)


def test_what_cannot_be_read_is_refused(model: PreTrainedModel, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "float")
    with pytest.raises(ValueError, match="no quantised checkpoint"):
        load_quantized(tmp_path / "float")
    with pytest.raises(ValueError, match="'awq'"):
        read_config({"quant_method": "awq", "bits": 4})
    with pytest.raises(ValueError, match="marlin"):
        read_config({"quant_method": "gptq", "bits": 4, "checkpoint_format": "marlin"})
    with pytest.raises(ValueError, match="auto_round:auto_awq"):
        read_config({"quant_method": "auto-round", "bits": 4, "packing_format": "auto_round:auto_awq"})
    with pytest.raises(ValueError, match="no quantised layer"):
        save_quantized(model, tmp_path / "x")
    assert not (tmp_path / "x").exists()
    with pytest.raises(ValueError, match="quant_method"):
        save_quantized(quantize_model(model), tmp_path / "x", quant_method="awq")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_file_that_was_cut_off_is_named(model: PreTrainedModel, tmp_path: Path, name: str) -> None:
    path = save_quantized(quantize_model(model, 8), tmp_path) / name
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    for load in (load_quantized, load_model):
        with pytest.raises(ValueError, match=f"{name} is damaged") as found:
            load(str(tmp_path))
        assert "\n" not in str(found.value)
