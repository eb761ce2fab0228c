# SPDX-License-Identifier: Apache-2.0
"""Models quantised by other packages as members of a chain, and calibration by such packages, where they are here."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_checkpoints import byte_tokenizer
from tiny_models import prompts
from transformers import AutoModelForCausalLM, PreTrainedModel

from hf_polyspec.quantization import agreement, quantize_model, quantize_with_library
from hf_polyspec.quantization.modules import quantized_layers

Tiny = Callable[..., PreTrainedModel]
# What these packages say on import and in use is theirs.
pytestmark = pytest.mark.filterwarnings("ignore")
IDS = torch.randint(3, 48, (4, 24), generator=torch.Generator().manual_seed(5))


@pytest.fixture(scope="module")
def target(tiny: Tiny) -> PreTrainedModel:
    return tiny("llama", hidden_size=64, intermediate_size=128, initializer_range=0.15)


def _same_text(target: PreTrainedModel, middle: Any, drafter: Any) -> None:
    """Greedy text is the target's, with part of the middle's proposals accepted and the middle a real verifier."""
    for batch in (1, 3):
        options = {**prompts(batch), "max_new_tokens": 14, "do_sample": False}
        plain = target.generate(**options)
        output = target.generate(
            **options,
            assistant_models=[middle, drafter],
            polyspec_block_size=4,
            num_assistant_tokens=3,
            return_dict_in_generate=True,
        )
        assert output.sequences.tolist() == plain.tolist()
        assert output.polyspec.levels[0].accepted > 0
        assert output.polyspec.levels[1].forward_passes > 0


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_bitsandbytes_middle(enabled: None, target, noisy, tmp_path: Path, kind: str) -> None:
    pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig

    target.save_pretrained(tmp_path)
    settings: dict[str, Any] = {"load_in_8bit": True}
    if kind == "nf4":
        settings = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    config = BitsAndBytesConfig(**settings)
    middle = AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=config, device_map={"": "cpu"}, dtype=torch.float32
    ).eval()
    assert any("bit" in type(module).__name__ for module in middle.modules())
    assert agreement(target, middle, IDS) > 0.5
    _same_text(target, middle, noisy(target, 0.05, seed=2))


def test_torchao_middle(enabled: None, target, noisy, tmp_path: Path) -> None:
    pytest.importorskip("torchao")
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    target.save_pretrained(tmp_path)
    middle = AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=TorchAoConfig(Int8WeightOnlyConfig()), device_map={"": "cpu"}, dtype=torch.float32
    ).eval()
    assert type(middle.model.layers[0].mlp.up_proj.weight.data) is not torch.Tensor
    assert agreement(target, middle, IDS) > 0.9
    _same_text(target, middle, noisy(target, 0.05, seed=2))


def test_autoround_calibrates(tiny: Tiny) -> None:
    pytest.importorskip("auto_round")
    tokenizer = byte_tokenizer()
    model = tiny("llama", vocab_size=264, hidden_size=64, intermediate_size=96, initializer_range=0.15)
    before = copy.deepcopy(model.state_dict())
    generator = torch.Generator().manual_seed(5)
    texts = list(torch.randint(3, len(tokenizer), (8, 32), generator=generator))
    made = quantize_with_library("autoround", model, tokenizer, texts, 4, 32, iterations=20)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    widths = {name: layer.bits for name, layer in quantized_layers(made).items()}
    assert widths.pop("lm_head") == 8
    assert set(widths.values()) == {4}
    assert len(widths) == 14
    fresh = torch.randint(3, len(tokenizer), (4, 32), generator=generator)
    assert agreement(model, made, fresh) > agreement(model, quantize_model(model, 4, 32, symmetric=True), fresh)


def test_unknown_library_and_no_text(target) -> None:
    with pytest.raises(ValueError, match="is no library"):
        quantize_with_library("magic", target, None, [IDS[0]])
