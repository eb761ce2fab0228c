# SPDX-License-Identifier: Apache-2.0
"""Folders of other writers: AutoGPTQ's names of files, and a quantised head under a config that says it is tied."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from hf_polyspec.integers.gptq_format import to_gptq
from hf_polyspec.integers.weights import round_to_nearest
from hf_polyspec.models.by_name import load_model
from hf_polyspec.quantization import load_quantized
from hf_polyspec.quantization.linear import Int4Linear
from hf_polyspec.quantization.model import linear_layers
from hf_polyspec.quantization.modules import quantized_layers

Tiny = Callable[..., PreTrainedModel]
IDS = torch.randint(48, (1, 20), generator=torch.Generator().manual_seed(5))
BASE = "gptq_model-4bit-32g"


@torch.no_grad()
def scores(model: Any) -> torch.Tensor:
    logits: torch.Tensor = model(IDS).logits
    return logits


def stands_for(loaded: Any, exact: Any) -> None:
    """Every matrix is the float model's to the last bit; products round their inputs to 16 bits, seen in the scores."""
    layers = quantized_layers(loaded)
    assert layers
    for name, layer in layers.items():
        torch.testing.assert_close(layer.weight, exact.get_submodule(name).weight, rtol=1e-6, atol=0)
    torch.testing.assert_close(scores(loaded), scores(exact), rtol=0, atol=1e-3 * float(scores(exact).abs().max()))


def gptq(model: PreTrainedModel, head: bool) -> tuple[dict[str, torch.Tensor], PreTrainedModel]:
    """A model's tensors in GPTQ's format, and the float model they stand for; its embedding stays its own."""
    exact = AutoModelForCausalLM.from_config(
        type(model.config)(**{**model.config.to_dict(), "tie_word_embeddings": False})
    )
    exact.load_state_dict(model.state_dict())
    tensors = {name: tensor.clone() for name, tensor in exact.state_dict().items()}
    for name, layer in linear_layers(exact, lambda name, _: head or name != "lm_head").items():
        weight = round_to_nearest(layer.weight.detach(), 4, 32, True)
        layer.weight.data = weight.dequantize()
        del tensors[f"{name}.weight"]
        tensors |= {f"{name}.{key}": tensor for key, tensor in to_gptq(weight, 1).items()}
    return tensors, exact.eval()


@pytest.fixture(scope="module")
def plain(tiny: Tiny) -> PreTrainedModel:
    return tiny("llama", hidden_size=64, intermediate_size=96, initializer_range=0.1)


def described(folder: Path, model: PreTrainedModel, **settings: Any) -> Path:
    """AutoGPTQ's two files of settings; a config.json that knows nothing of GPTQ."""
    model.config.save_pretrained(folder)
    told = {"bits": 4, "group_size": 32, "damp_percent": 0.01, "desc_act": False, "sym": True, **settings}
    (folder / "quantize_config.json").write_text(json.dumps(told))
    return folder


def in_shards(folder: Path, base: str, ending: str, tensors: dict[str, torch.Tensor]) -> None:
    names, where = sorted(tensors), {}
    for number, part in enumerate((names[::2], names[1::2]), start=1):
        shard = f"{base}-{number:05d}-of-00002{ending}"
        write(folder / shard, {name: tensors[name] for name in part})
        where |= dict.fromkeys(part, shard)
    (folder / f"{base}{ending}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))


def write(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    if path.suffix == ".safetensors":
        save_file(tensors, path, metadata={"format": "pt"})
    else:
        torch.save(tensors, path)


@pytest.mark.parametrize("ending", [".safetensors", ".bin", ".pt"])
@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("base", [BASE, "weights"])
def test_files_named_as_autogptq_does(
    plain: PreTrainedModel, tmp_path: Path, ending: str, sharded: bool, base: str
) -> None:
    tensors, exact = gptq(plain, head=False)
    described(tmp_path, plain)
    if sharded:
        in_shards(tmp_path, base, ending, tensors)
    else:
        write(tmp_path / f"{base}{ending}", tensors)
    before = sorted(tmp_path.iterdir())
    stands_for(load_quantized(tmp_path, torch.float32), exact)
    assert sorted(tmp_path.iterdir()) == before
    by_name = load_model(str(tmp_path))
    assert isinstance(by_name.model.layers[0].mlp.up_proj, Int4Linear)


@pytest.mark.parametrize("told", [True, False])
def test_of_several_files_the_settings_tell_which(plain: PreTrainedModel, tmp_path: Path, told: bool) -> None:
    tensors, exact = gptq(plain, head=False)
    described(tmp_path, plain, model_file_base_name="mine" if told else None)
    write(tmp_path / f"{'mine' if told else BASE}.safetensors", tensors)
    write(tmp_path / "adapter.safetensors", {"a": torch.zeros(1)})
    stands_for(load_quantized(tmp_path, torch.float32), exact)


def test_several_files_and_no_name_are_refused_in_one_sentence(plain: PreTrainedModel, tmp_path: Path) -> None:
    described(tmp_path, plain)
    for name in ("one", "two"):
        write(tmp_path / f"{name}.safetensors", {"a": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"\"one.safetensors\", \"two.safetensors\".*model_file_base_name"):
        load_quantized(tmp_path)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("method", ["gptq", "hf_polyspec"])
def test_a_quantised_head_is_its_own_whatever_the_config_says(
    tiny: Tiny, tmp_path: Path, tied: bool, method: str
) -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 96, "initializer_range": 0.1, "vocab_size": 64}
    model = tiny("llama", tie_word_embeddings=tied, **sizes)
    tensors, exact = gptq(model, head=True)
    model.config.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    settings = {"quant_method": method, "bits": 4, "group_size": 32, "sym": True, "desc_act": False, "lm_head": True}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": settings}))
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    loaded: Any = load_quantized(tmp_path, torch.float32)
    assert isinstance(loaded.lm_head, Int4Linear)
    assert not loaded.config.tie_word_embeddings
    assert torch.equal(loaded.model.embed_tokens.weight, exact.model.embed_tokens.weight)
    stands_for(loaded, exact)
    # and so it does once it is saved again
    loaded.save_pretrained(tmp_path / "again")
    assert torch.equal(
        scores(AutoModelForCausalLM.from_pretrained(tmp_path / "again", dtype=torch.float32)), scores(loaded)
    )
