# SPDX-License-Identifier: Apache-2.0
"""Quantised copies leave the model alone and stay close to it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from hf_polyspec.host.compatibility import vocabulary_size
from hf_polyspec.integers.linear import QuantizedLinear
from hf_polyspec.quantization import (
    Int4Linear,
    Int8Linear,
    agreement,
    choose_layer_bits,
    compare,
    input_moments,
    quantize_model,
    sensitivity,
    speed_ratios,
)
from hf_polyspec.quantization.modules import quantized_layers
from hf_polyspec.quantization.store import LayerStore

Tiny = Callable[..., PreTrainedModel]
IDS = torch.randint(48, (2, 20), generator=torch.Generator().manual_seed(5))


@pytest.fixture(scope="module")
def model(tiny: Tiny) -> PreTrainedModel:
    return tiny("llama", hidden_size=64, intermediate_size=96, initializer_range=0.1)


def test_the_model_stays_as_it_was(model: PreTrainedModel) -> None:
    before = {name: (tensor.clone(), tensor.data_ptr()) for name, tensor in model.state_dict().items()}
    kinds = {name: type(module) for name, module in model.named_modules()}
    training = model.training
    copy = quantize_model(model, 4, 32)
    copy.to(torch.bfloat16)
    copy(IDS)
    assert {name: type(module) for name, module in model.named_modules()} == kinds
    assert model.training == training
    for name, tensor in model.state_dict().items():
        assert tensor.data_ptr() == before[name][1]
        assert torch.equal(tensor, before[name][0])


def test_untouched_tensors_are_shared(model: PreTrainedModel) -> None:
    copy = quantize_model(model)
    assert copy.get_input_embeddings().weight.data_ptr() == model.get_input_embeddings().weight.data_ptr()
    assert copy.get_input_embeddings().weight is not model.get_input_embeddings().weight


def test_eight_bits_agree_more_than_four(model: PreTrainedModel) -> None:
    eight, four, three = (agreement(model, quantize_model(model, bits, 32), IDS) for bits in (8, 4, 3))
    assert 1 > eight > four > three
    assert eight > 0.98


def test_generate_works_on_the_copy(model: PreTrainedModel) -> None:
    copy = quantize_model(model, 8)
    assert copy.generate(IDS[:1], max_new_tokens=5, do_sample=False).shape == (1, 25)


def test_head_and_filter_and_single_layers(model: PreTrainedModel) -> None:
    last = "model.layers.1.mlp.down_proj"
    copy = quantize_model(model, 4, 32, head_bits=None, layer_bits={last: 8})
    layers = quantized_layers(copy)
    assert type(copy.lm_head) is nn.Linear
    assert isinstance(layers[last], Int8Linear)
    assert sum(isinstance(layer, Int4Linear) for layer in layers.values()) == len(layers) - 1
    only = quantize_model(model, 8, modules=lambda name, _: "mlp" in name)
    assert set(quantized_layers(only)) == {name for name in quantized_layers(copy) if "mlp" in name}


def test_tied_embeddings_stay_float(tiny: Tiny) -> None:
    tied = tiny("llama", hidden_size=64, tie_word_embeddings=True)
    copy = quantize_model(tied)
    assert isinstance(copy.lm_head, Int8Linear)
    assert torch.equal(copy.get_input_embeddings().weight, tied.get_input_embeddings().weight)
    assert tied.lm_head.weight is tied.get_input_embeddings().weight


def test_conv1d_models(tiny: Tiny) -> None:
    gpt2 = tiny("gpt2", n_embd=64, n_layer=2, n_head=2, n_positions=64, initializer_range=0.1)
    assert agreement(gpt2, quantize_model(gpt2), IDS) > 0.97


@pytest.mark.parametrize("model_type", ["qwen2", "gemma", "phi3", "gpt_neox"])
def test_other_families(tiny: Tiny, model_type: str) -> None:
    other = tiny(model_type, hidden_size=64, intermediate_size=96, head_dim=16, initializer_range=0.1)
    assert agreement(other, quantize_model(other), IDS) > 0.97


# transformers 5.23 warns about a name that PEFT still reads.
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")
def test_adapters_are_merged_into_the_copy(tiny: Tiny) -> None:
    peft = pytest.importorskip("peft")
    base = tiny("llama", hidden_size=64, initializer_range=0.1)
    plain = quantize_model(base)
    lora = peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    adapted = peft.get_peft_model(base, lora)
    adapted.eval()
    copy = quantize_model(adapted)
    assert any("lora" in name for name, _ in adapted.named_modules())
    assert not any("lora" in name for name, _ in copy.named_modules())
    assert agreement(adapted, copy, IDS) > 0.97 > agreement(adapted, plain, IDS)


def test_feedback_beats_rounding(model: PreTrainedModel) -> None:
    texts = torch.randint(48, (8, 40), generator=torch.Generator().manual_seed(9))
    moments = input_moments(model, texts)
    plain = quantize_model(model, 3, 32)
    better = quantize_model(model, 3, 32, method="gptq", calibration=moments)
    searched = quantize_model(model, 3, 32, method="search", calibration=moments)
    scores = [agreement(model, copy, texts) for copy in (plain, searched, better)]
    assert scores[0] < scores[1] < scores[2]


def test_calibration_leaves_no_hooks(model: PreTrainedModel) -> None:
    moments = input_moments(model, IDS)
    diagonal = input_moments(model, IDS, diagonal=True)
    assert not any(module._forward_pre_hooks for module in model.modules())
    for name, matrix in moments.items():
        torch.testing.assert_close(diagonal[name].diagonal(), matrix.diagonal())


def test_sensitive_layers_get_the_bits(model: PreTrainedModel) -> None:
    losses = sensitivity(model, IDS[:1], bits=2, group_size=32)
    assert set(losses) == set(quantized_layers(quantize_model(model)))
    assert max(losses.values()) > 0
    sizes = dict.fromkeys(losses, 10)
    ranked = sorted(losses, key=losses.__getitem__, reverse=True)
    assert set(choose_layer_bits(losses, sizes, 2.5 / len(losses))) == set(ranked[:2])
    assert choose_layer_bits(losses, sizes, 0.0) == {}
    with pytest.raises(ValueError, match="between 0 and 1"):
        choose_layer_bits(losses, sizes, 1.5)


def test_bad_requests_are_refused(model: PreTrainedModel) -> None:
    with pytest.raises(ValueError, match="bits=5"):
        quantize_model(model, 5)
    with pytest.raises(ValueError, match="method"):
        quantize_model(model, method="awq")
    with pytest.raises(ValueError, match="needs calibration"):
        quantize_model(model, 4, method="gptq")
    with pytest.raises(ValueError, match="no linear layer"):
        quantize_model(model, modules=lambda name, _: False)
    with pytest.raises(ValueError, match="'nothing'"):
        quantize_model(model, layer_bits={"nothing": 8})
    with pytest.raises(ValueError, match="group_size"):
        quantize_model(model, 4, 0)


def test_a_model_agrees_with_itself(model: PreTrainedModel) -> None:
    found = compare(model, model, IDS, starts=[5, 19])
    assert found.tokens == 16
    assert found.agreement == pytest.approx(1.0, abs=1e-6)
    assert found.same_choice == 1.0
    assert found.perplexity == found.perplexity_original
    with pytest.raises(ValueError, match="token to predict"):
        compare(model, model, IDS, starts=[5, 20])


def test_agreement_is_one_minus_total_variation() -> None:
    class Fixed(nn.Module):
        def __init__(self, probabilities: list[float]) -> None:
            super().__init__()
            self.logits = nn.Parameter(torch.tensor(probabilities).log())

        def forward(self, ids: torch.Tensor) -> object:
            return type("Output", (), {"logits": self.logits.expand(*ids.shape, -1)})

    p, q = Fixed([0.5, 0.3, 0.2]), Fixed([0.2, 0.3, 0.5])
    assert agreement(p, q, torch.zeros(1, 4, dtype=torch.long)) == pytest.approx(0.7)
    sharp = compare(p, q, torch.zeros(1, 4, dtype=torch.long), temperature=0.5)
    first = torch.tensor([0.25, 0.09, 0.04]) / 0.38
    assert sharp.agreement == pytest.approx(float(torch.minimum(first, first.flip(0)).sum()))


def test_speed_is_measured_against_the_original(model: PreTrainedModel) -> None:
    points = speed_ratios(model, model, rows=(1, 3), context=8, rounds=5)
    assert [point.rows for point in points] == [1, 3]
    assert all(point.low <= point.ratio <= point.high for point in points)


def test_finished_layers_are_taken_up_again(model: PreTrainedModel, tmp_path: Path) -> None:
    class Interrupted(Exception):
        pass

    done: list[str] = []

    def stop(name: str) -> None:
        done.append(name)
        if len(done) == 3:
            raise Interrupted

    store = LayerStore(tmp_path / "part", {"bits": 8})
    with pytest.raises(Interrupted):
        quantize_model(model, store=store, progress=stop)
    kept = store.get(done[0])
    assert kept is not None
    again = LayerStore(tmp_path / "part", {"bits": 8})
    again.put(done[0], type(kept)(kept.codes, 2 * kept.scales, kept.zeros, kept.g_idx, kept.bits, kept.group_size))
    copy = quantized_layers(quantize_model(model, store=again))
    plain = quantized_layers(quantize_model(model))
    assert torch.equal(copy[done[0]].weight, 2 * plain[done[0]].weight)
    assert torch.equal(copy[done[1]].weight, plain[done[1]].weight)
    with pytest.raises(ValueError, match="other settings"):
        LayerStore(tmp_path / "part", {"bits": 4})
    again.remove()
    assert not (tmp_path / "part").exists()


def test_a_quantised_head_is_not_expanded_to_count_its_rows(
    model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every call of a chain asks."""
    middle = quantize_model(model, 8)
    assert isinstance(middle.get_output_embeddings(), Int8Linear)
    rows = vocabulary_size(model)

    def expanded(layer: Int8Linear) -> None:
        raise AssertionError("expanded")

    monkeypatch.setattr(QuantizedLinear, "weight", property(expanded))
    assert vocabulary_size(middle) == rows == model.config.vocab_size
