# SPDX-License-Identifier: Apache-2.0
"""Models whose weights accelerate fetches when a pass comes to them (`device_map`, offloading), as any level."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import head_for, prompts, tiny
from transformers import AutoModelForCausalLM, PreTrainedModel

import hf_polyspec
from hf_polyspec import SuffixDrafter
from hf_polyspec.quantization import quantize_model

PROMPTS = prompts(2, 9)
PLAIN: dict[str, Any] = {"max_new_tokens": 12, "pad_token_id": 0, "do_sample": False}
MIXED = {
    "model.embed_tokens": "cpu",
    "model.layers.0": "disk",
    "model.layers.1": "cpu",
    "model.norm": "cpu",
    "model.rotary_emb": "cpu",
    "lm_head": "disk",
}


@pytest.fixture(scope="module")
def whole() -> PreTrainedModel:
    return tiny("llama", num_hidden_layers=2)


def on_cpu(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, device_map={"": "cpu"})


def on_disk_in_part(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, device_map=MIXED, offload_folder=folder / "part")


def on_disk(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, device_map={"": "disk"}, offload_folder=folder / "all")


def until_needed(folder: Path) -> Any:
    from accelerate import cpu_offload

    return cpu_offload(AutoModelForCausalLM.from_pretrained(folder), execution_device=torch.device("cpu"))


@pytest.fixture(scope="module", params=[on_cpu, on_disk_in_part, on_disk, until_needed])
def away(request: pytest.FixtureRequest, whole: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("away")
    whole.save_pretrained(folder)
    load: Callable[[Path], Any] = request.param
    model = load(folder).eval()
    assert (request.param is on_cpu) != any(parameter.is_meta for parameter in model.parameters())
    return model


def places(model: Any) -> list[tuple[str, torch.device]]:
    return [(name, parameter.device) for name, parameter in model.named_parameters()]


# Of releases before 5.20, which take the device of a model for that of its first weight.
@pytest.mark.filterwarnings("ignore:You are calling .generate.. with the `input_ids` being on a device type")
@pytest.mark.parametrize(
    "levels",
    [["suffix"], ["small"], ["int8", "suffix"], ["int4"], ["head"], ["early-exit:1"]],
    ids=lambda levels: " over ".join(levels),
)
@pytest.mark.parametrize("options", [{}, {"do_sample": True, "temperature": 0.8}], ids=["greedy", "sampled"])
def test_as_the_target(away: Any, whole: Any, levels: list[str], options: dict[str, Any]) -> None:
    before = places(away)
    made = {"suffix": SuffixDrafter(), "small": tiny("llama", num_hidden_layers=1, seed=4), "head": head_for(whole)}
    torch.manual_seed(3)
    wanted = whole.generate(**PROMPTS, **{**PLAIN, **options})
    torch.manual_seed(3)
    chain = [made.get(name, name) for name in levels]
    assert torch.equal(hf_polyspec.generate(away, **PROMPTS, **{**PLAIN, **options}, assistant_models=chain), wanted)
    assert places(away) == before, "what was fetched is put back"


def test_as_the_middle(away: Any, whole: Any) -> None:
    told = hf_polyspec.generate(
        whole, **PROMPTS, **PLAIN, assistant_models=[away, SuffixDrafter()], return_dict_in_generate=True
    )
    assert torch.equal(told.sequences, whole.generate(**PROMPTS, **PLAIN))
    assert told.polyspec.levels[0].forward_passes < 6, "the target agrees with a copy of itself"


def test_a_copy_in_fewer_bits_is_in_memory_and_computes_as_that_of_the_whole_model(away: Any, whole: Any) -> None:
    copy = quantize_model(away, 8)
    assert not any(tensor.is_meta for tensor in (*copy.parameters(), *copy.buffers()))
    ids = PROMPTS["input_ids"]
    assert torch.equal(copy(input_ids=ids).logits, quantize_model(whole, 8)(input_ids=ids).logits)


@pytest.mark.parametrize("away", [on_disk], indirect=True)
def test_what_would_change_offloaded_weights_is_refused(away: Any) -> None:
    moments = {
        name: torch.eye(module.in_features) for name, module in away.named_modules() if hasattr(module, "in_features")
    }
    with pytest.raises(ValueError, match=r'method="awq" folds scales .* LlamaForCausalLM are offloaded: use "rtn"'):
        quantize_model(away, 4, method="awq", calibration=moments)


def test_weights_that_are_nowhere_are_refused() -> None:
    with torch.device("meta"):
        empty = tiny("llama")
    with pytest.raises(ValueError, match=r"LlamaForCausalLM has weights that are nowhere"):
        quantize_model(empty, 8)
