# SPDX-License-Identifier: Apache-2.0
"""Zeros of GPTQ checkpoints, stored as they are or less one, whatever the config says of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from hf_polyspec.integers.gptq_format import stored_version, to_gptq
from hf_polyspec.integers.weights import QuantizedWeight, round_to_nearest
from hf_polyspec.quantization import load_quantized
from hf_polyspec.quantization.checkpoint import checkpoint_parts
from hf_polyspec.quantization.config import PolySpecQuantizationConfig
from hf_polyspec.quantization.model import linear_layers, quantize_model
from hf_polyspec.quantization.modules import quantized_layers, replace_module

Tiny = Callable[..., PreTrainedModel]


@pytest.fixture(scope="module")
def model(tiny: Tiny) -> PreTrainedModel:
    return tiny("llama", hidden_size=64, intermediate_size=96, vocab_size=64, initializer_range=0.1)


def _write(
    model: PreTrainedModel, folder: Path, bits: int, versions: Callable[[str], int], settings: dict[str, Any], sym: bool
) -> dict[str, Tensor]:
    """A checkpoint whose layers store their zeros in these versions; the matrices that it holds."""
    state, wanted = dict(model.state_dict()), {}
    for name, layer in linear_layers(model).items():
        weight = round_to_nearest(layer.weight.detach(), bits, 32, sym)
        del state[f"{name}.weight"]
        state.update({f"{name}.{key}": one for key, one in to_gptq(weight, versions(name)).items()})
        # Scales are kept in float16, which holds these.
        wanted[name] = weight.dequantize()
    model.config.save_pretrained(folder)
    path = folder / "config.json"
    stored = {"quant_method": "gptq", "bits": bits, "group_size": 32, "sym": sym, **settings}
    path.write_text(json.dumps({**json.loads(path.read_text()), "quantization_config": stored}))
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    return wanted


def _same(folder: Path, wanted: dict[str, Tensor]) -> None:
    layers = quantized_layers(load_quantized(folder, "float32"))
    assert layers.keys() == wanted.keys()
    for name, layer in layers.items():
        assert torch.equal(layer.weight, wanted[name]), name


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("label", [{"checkpoint_format": "gptq"}, {"checkpoint_format": "gptq_v2"}, {}])
@pytest.mark.parametrize("version", [1, 2])
def test_symmetric_zeros_tell_how_they_are_stored(
    model: PreTrainedModel, tmp_path: Path, bits: int, label: dict[str, Any], version: int
) -> None:
    _same(tmp_path, _write(model, tmp_path, bits, lambda _: version, label, sym=True))


def test_layers_stored_differently(model: PreTrainedModel, tmp_path: Path) -> None:
    wanted = _write(model, tmp_path, 4, lambda name: 1 + ("mlp" in name), {"checkpoint_format": "gptq"}, sym=True)
    _same(tmp_path, wanted)


@pytest.mark.parametrize(("label", "version"), [("gptq", 1), ("gptq_v2", 2)])
def test_where_zeros_carry_information_the_config_counts(
    model: PreTrainedModel, tmp_path: Path, label: str, version: int
) -> None:
    _same(tmp_path, _write(model, tmp_path, 4, lambda _: version, {"checkpoint_format": label}, sym=False))


def test_what_contradicts_itself_is_refused(model: PreTrainedModel, tmp_path: Path) -> None:
    _write(model, tmp_path, 4, lambda _: 1, {"checkpoint_format": "gptq"}, sym=False)
    path = tmp_path / "config.json"
    path.write_text(path.read_text().replace('"sym": false', '"sym": true'))
    with pytest.raises(
        ValueError, match=r"says that model.*proj is symmetric \(sym\), but .* all stored as 7 or all as 8"
    ):
        load_quantized(tmp_path)


@pytest.mark.parametrize(
    "settings",
    [
        {
            "dynamic": {
                "-:.*norm": {},
                "+:.*lm_head$": {"bits": 4},
                r"+:.*\\.layers\\..*": {"sym": False},
                "+:^lm_head$": {"sym": False},
            }
        },
        {"extra_config": {"lm_head": {"sym": False}}, "dynamic": {r".*\\.layers\\..*": {"sym": False}}},
    ],
)
def test_layers_with_settings_of_their_own(model: PreTrainedModel, tmp_path: Path, settings: dict[str, Any]) -> None:
    """gptqmodel's patterns and AutoRound's names: none of these layers is symmetric, whatever the config says first."""
    settings = json.loads(json.dumps(settings).replace("\\\\", "\\"))
    wanted = _write(model, tmp_path, 4, lambda _: 1, {"checkpoint_format": "gptq"}, sym=False)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"].update(sym=True, **settings)
    path.write_text(json.dumps(config))
    _same(tmp_path, wanted)


def test_names_and_patterns() -> None:
    config = PolySpecQuantizationConfig(sym=True, dynamic={"+:^a$": {"sym": False}, "-:c": {}, "b": {"bits": 8}})
    assert [config.symmetric(name) for name in ("a", "ab", "b", "c")] == [False, True, True, True]
    config = PolySpecQuantizationConfig(sym=False, extra_config={"a": {"sym": True}})
    assert [config.symmetric(name) for name in ("a", "b")] == [True, False]


def test_versions_of_words() -> None:
    weight = round_to_nearest(torch.randn(32, 64), 3, 32, symmetric=True)
    assert [stored_version(to_gptq(weight, version)["qzeros"], 3) for version in (1, 2)] == [1, 2]
    mixed = weight.zeros.clone()
    mixed[3, 0] = 3
    words = to_gptq(QuantizedWeight(weight.codes, weight.scales, mixed, weight.g_idx, 3, 32))["qzeros"]
    with pytest.raises(ValueError, match="from 2 to 3"):
        stored_version(words, 3)


def test_our_own_checkpoints_say_what_is_symmetric(model: PreTrainedModel) -> None:
    """An 8-bit layer that somebody rounded with zeros must not be called symmetric."""
    copy = quantize_model(model, 4, 32, symmetric=True)
    assert checkpoint_parts(copy)[0]["sym"] is True
    special = "model.layers.1.mlp.down_proj"
    layer = type(copy.get_submodule(special))
    lopsided = round_to_nearest(model.get_submodule(special).weight.detach(), 4, 32, symmetric=False)
    replace_module(copy, special, layer(lopsided))
    assert checkpoint_parts(copy)[0]["sym"] is False
    copy = quantize_model(model, 8)
    assert checkpoint_parts(copy)[0]["sym"] is True
    replace_module(copy, "lm_head", type(copy.lm_head)(round_to_nearest(model.lm_head.weight.detach(), 8, -1, False)))
    assert checkpoint_parts(copy)[0]["sym"] is False
