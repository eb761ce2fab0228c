# SPDX-License-Identifier: Apache-2.0
"""Recovery: the middle gets nearer to its target, exactly what was trained is stored, and nothing is lost on a kill."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

import hf_polyspec
from hf_polyspec.errors import DamagedFileError
from hf_polyspec.quantization import input_moments, load_quantized, quantize_model, save_quantized
from hf_polyspec.quantization.modules import quantized_layers
from hf_polyspec.quantization.recovery import STATE, Recovery, RecoveryOptions, recover
from hf_polyspec.quantization.straight_through import Grid, Student

pytest.importorskip("peft")
# transformers 5.23 warns about a name that PEFT still reads.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")

Tiny = Callable[..., PreTrainedModel]
GENERATOR = torch.Generator().manual_seed(4)
TEXTS = [torch.randint(3, 48, (40,), generator=GENERATOR) for _ in range(40)]
PROMPTS = [text[:6] for text in TEXTS[:9]]
SHORT = RecoveryOptions(steps=16, rank=4, batch=8, new_tokens=0, learning_rate=1e-2)
WRITTEN = RecoveryOptions(steps=1, rank=2, batch=2, new_tokens=6, samples=2)
QUICK = RecoveryOptions(steps=4, rank=2, batch=2, new_tokens=0, save_every=2)


@pytest.fixture(scope="module")
def target(tiny: Tiny) -> PreTrainedModel:
    return tiny("llama", initializer_range=0.15, num_hidden_layers=1)


@pytest.fixture(scope="module")
def middle(target: PreTrainedModel) -> torch.nn.Module:
    return quantize_model(target, 2, 32)


def _codes(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: layer.quantized_weight().codes for name, layer in quantized_layers(model).items()}


@pytest.fixture(scope="module")
def recovered(target: PreTrainedModel, middle: torch.nn.Module) -> Recovery:
    return recover(middle, target, TEXTS[10:], SHORT, held_out=TEXTS[:10])


def test_agreement_is_won(target, middle, recovered: Recovery) -> None:
    assert recovered.gain > 0.015
    assert recovered.improved
    assert recovered.model is not middle
    assert recovered.losses[-1] < recovered.losses[0]
    assert f"{recovered.after.agreement:.3f} after 16 steps" in recovered.sentence()


def test_the_result_is_an_integer_model_like_the_middle(middle, recovered: Recovery, tmp_path: Path) -> None:
    assert not any("lora" in name for name, _ in recovered.model.named_modules())
    old, new = quantized_layers(middle), quantized_layers(recovered.model)
    assert {name: (type(layer), layer.bits, layer.group_size) for name, layer in old.items()} == {
        name: (type(layer), layer.bits, layer.group_size) for name, layer in new.items()
    }
    loaded = load_quantized(save_quantized(recovered.model, tmp_path))
    assert all(torch.equal(codes, _codes(recovered.model)[name]) for name, codes in _codes(loaded).items())


def test_target_and_middle_stay_as_they_were(target, middle, recovered: Recovery) -> None:
    fresh = _codes(quantize_model(target, 2, 32))
    assert all(torch.equal(codes, fresh[name]) for name, codes in _codes(middle).items())
    assert not all(torch.equal(codes, fresh[name]) for name, codes in _codes(recovered.model).items())
    assert not any(parameter.grad is not None for parameter in target.parameters())


@pytest.mark.parametrize("method", ["rtn", "gptq", "awq"])
def test_untrained_student_is_the_middle(target, method: str) -> None:
    """Training starts at the stored integers, whatever chose them, and not at a fresh rounding of the weights."""
    moments = input_moments(target, [torch.cat(PROMPTS)])
    made = quantize_model(target, 3, 32, method=method, calibration=moments)
    merged = _codes(Student(made, target, rank=2).merged())
    assert all(torch.equal(codes, merged[name]) for name, codes in _codes(made).items())


def test_start_keeps_what_rounding_lost(target, middle) -> None:
    """A weight that lay near the edge of its cell starts there, so that little training moves it over."""
    name, layer = next(iter(quantized_layers(middle).items()))
    grid = Grid(layer.quantized_weight())
    weight = target.get_submodule(name).weight.detach()
    start = grid.start(weight)
    assert float((start - weight).abs().mean()) < 0.1 * float((layer.weight - weight).abs().mean())
    assert torch.equal(grid.start(10 * weight), layer.weight)
    assert torch.equal(grid.start(None), layer.weight)


def test_a_worse_result_is_not_kept(target, middle) -> None:
    wild = RecoveryOptions(steps=2, rank=2, batch=2, new_tokens=0, learning_rate=10.0)
    result = recover(middle, target, PROMPTS, wild)
    assert result.after.agreement < result.before.agreement
    assert result.model is middle
    assert not result.improved
    assert "won nothing" in result.sentence()


def test_a_killed_run_goes_on_where_it_was(target, middle, tmp_path: Path) -> None:
    whole = recover(middle, target, PROMPTS, QUICK)

    class Killed(Exception):
        pass

    def kill(step: int, loss: float) -> None:
        if step == 3:
            raise Killed

    with pytest.raises(Killed):
        recover(middle, target, PROMPTS, QUICK, folder=tmp_path, progress=kill)
    with pytest.raises(ValueError, match="other settings"):
        recover(middle, target, PROMPTS[:-2], QUICK, folder=tmp_path)
    seen: list[int] = []
    rest = recover(middle, target, PROMPTS, QUICK, folder=tmp_path, progress=lambda step, _: seen.append(step))
    assert seen == [3, 4]
    assert rest.losses == whole.losses[2:]
    assert rest.after == whole.after
    assert not (tmp_path / STATE).exists()


def test_a_damaged_state_is_named(target, middle, tmp_path: Path) -> None:
    for content in (b"", b"half of a state", None):
        if content is None:
            torch.save({"step": 1}, tmp_path / STATE)
        else:
            (tmp_path / STATE).write_bytes(content)
        with pytest.raises(DamagedFileError, match=rf"{STATE} is damaged .*recovers from the beginning"):
            recover(middle, target, PROMPTS, QUICK, folder=tmp_path)


def test_a_peft_target_and_its_middle(target, tiny: Tiny) -> None:
    import copy

    import peft

    lora = peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    adapted = peft.get_peft_model(copy.deepcopy(target), lora).eval()
    before = {name: tensor.clone() for name, tensor in adapted.state_dict().items()}
    result = recover(quantize_model(adapted, 3, 32), adapted, PROMPTS, WRITTEN)
    assert result.before.tokens == 3 * 2 * 6
    without = recover(quantize_model(target, 3, 32), adapted, PROMPTS, WRITTEN)
    assert result.before.agreement > without.before.agreement + 0.05
    assert all(torch.equal(tensor, before[name]) for name, tensor in adapted.state_dict().items())


def test_refusals(target, middle) -> None:
    with pytest.raises(ValueError, match="no quantised layer"):
        recover(target, target, PROMPTS, QUICK)
    with pytest.raises(ValueError, match="at least two"):
        recover(middle, target, PROMPTS[:1], QUICK)
    with pytest.raises(ValueError, match="steps=0"):
        RecoveryOptions(steps=0)
    with pytest.raises(ValueError, match="learning_rate"):
        RecoveryOptions(learning_rate=0.0)
    assert hf_polyspec.recover is recover
